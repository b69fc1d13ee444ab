"""Promise 4 and 5: weights may change, and every instance runs on its own weights."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

import mpq_fx
from mpq_fx.numerics import relative_rms
from mpq_fx.registry import bindings_of

# Fewer bits have errors that an edit of a weight may take beyond the tolerance.
FORMATS = ["int8", "bfloat16"]
OPTIONS = {"target": "reference", "tolerance": 0.1, "calibration_calls": 3, "formats": FORMATS}


class Block(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


class Loop(nn.Module):
    """Equal blocks in a loop with a graph break: Dynamo compiles the body once."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(seed) for seed in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            torch._dynamo.graph_break()  # noqa: TID251 -- there is no public spelling
            x = block(x)
        return x


def batch(seed: int) -> torch.Tensor:
    return torch.randn(4, 32, generator=torch.Generator().manual_seed(seed))


def calibrate(compiled, calls: int = 4) -> None:
    with torch.inference_mode():
        for seed in range(calls):
            compiled(batch(100 + seed))


def error(compiled, model: nn.Module, seed: int = 7) -> float:
    with torch.inference_mode():
        return relative_rms(compiled(batch(seed)), model(batch(seed)))


def is_installed(compiled) -> bool:
    found = bindings_of(compiled)
    return bool(found) and all(binding.installed is not None for _, binding in found)


def quantized(model: nn.Module):
    compiled = torch.compile(model.eval(), backend="mpq", options=OPTIONS)
    calibrate(compiled)
    assert is_installed(compiled)
    return compiled


def test_two_instances_of_one_class_keep_their_weights(isolated):
    first, second = Block(1).eval(), Block(2).eval()
    a, b = quantized(first), quantized(second)
    for _ in range(3):
        assert 0 < error(a, first) < 0.1
        assert 0 < error(b, second) < 0.1


def test_equal_blocks_compiled_one_by_one_keep_their_weights(isolated):
    blocks = nn.Sequential(*(Block(seed) for seed in range(12))).eval()
    for block in blocks:
        block.compile(backend="mpq", options=OPTIONS)
    calibrate(blocks)
    plain = copy.deepcopy(blocks)
    assert error(blocks, plain) < 0.2
    assert sum(binding.installed is not None for _, binding in bindings_of(blocks)) == 12


def test_a_loop_with_a_graph_break_keeps_each_layers_weights(isolated):
    model = Loop().eval()
    assert 0 < error(quantized(model), model) < 0.1


def test_one_weight_shared_by_two_sites_is_one_constant(isolated):
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    model[2].weight = model[0].weight
    compiled = quantized(model)
    ((_, binding),) = bindings_of(compiled)
    assert error(compiled, model) < 0.15  # of inputs that nobody chose by; the tolerance is 0.1
    assert len(set(binding.site_names.values())) == 2


def test_compile_of_the_forward_method_works(isolated):
    model = Block().eval()
    compiled = torch.compile(model.forward, backend="mpq", options=OPTIONS)
    calibrate(compiled)
    assert is_installed(model)
    assert 0 < error(compiled, model) < 0.1


def test_module_compile_works_in_place(isolated):
    model = Block().eval()
    plain = copy.deepcopy(model)
    model.compile(backend="mpq", options=OPTIONS)
    calibrate(model)
    assert is_installed(model)
    assert 0 < error(model, plain) < 0.1


@pytest.mark.parametrize(
    "edit", ["in place", "optimizer", "load", "assign", "data", "new parameter"]
)
def test_an_edited_weight_is_seen_on_the_next_call(isolated, edit):
    model = Block().eval()
    compiled = quantized(model)
    other = Block(5).state_dict()
    if edit == "in place":
        with torch.no_grad():
            model.up.weight.mul_(-3)
    elif edit == "optimizer":
        model.up.weight.grad = torch.ones_like(model.up.weight)
        torch.optim.SGD(model.parameters(), lr=0.5).step()
    elif edit == "load":
        model.load_state_dict(other)
    elif edit == "assign":
        model.load_state_dict(other, assign=True)
    elif edit == "data":
        model.up.weight.data = other["up.weight"].clone()
    else:
        model.up.weight = nn.Parameter(other["up.weight"].clone())
    assert error(compiled, model) < 0.1


def test_a_data_edit_in_place_is_seen_within_the_stated_number_of_calls(isolated):
    from mpq_fx.watch import CALLS

    model = Block().eval()
    compiled = quantized(model)
    model.down.weight.data += 0.5
    errors = [error(compiled, model) for _ in range(CALLS + 1)]
    assert errors[-1] < 0.1


def test_refresh_sees_the_smallest_data_edit_at_once(isolated):
    model = Block().eval()
    compiled = quantized(model)
    model.down.weight.data[3, 5] += 40.0
    assert mpq_fx.refresh(compiled) == ["down.weight"]
    assert error(compiled, model) < 0.1
    assert mpq_fx.refresh(compiled) == []


def test_only_touched_constants_are_recomputed_and_nothing_recompiles(isolated, monkeypatch):
    from mpq_fx import binding as module

    model = Block().eval()
    compiled = quantized(model)
    ((_, binding),) = bindings_of(compiled)
    before, touched = binding.installed, []
    plain = module.evaluate
    monkeypatch.setattr(
        module,
        "evaluate",
        lambda gm, recipes, values: (
            touched.extend(r.parameters for r in recipes) or plain(gm, recipes, values)
        ),
    )
    with torch.no_grad():
        model.up.weight.add_(1.0)
    assert error(compiled, model) < 0.1
    assert binding.installed is before
    assert touched
    assert all(names == touched[0] for names in touched)


def test_inference_tensors_work_as_weights(isolated):
    with torch.inference_mode():
        model = Block().eval()
    assert model.up.weight.is_inference()
    compiled = quantized(model)
    assert 0 < error(compiled, model) < 0.1


def test_a_change_of_dtype_runs_right_on_the_next_call(isolated):
    model = Block().eval()
    compiled = quantized(model)
    model.to(torch.float64)
    x = batch(3).double()
    with torch.inference_mode():
        assert torch.allclose(compiled(x), model(x))


def test_two_threads_see_their_own_results(isolated):
    model = Block().eval()
    compiled = torch.compile(model, backend="mpq", options=OPTIONS)
    calibrate(compiled, 1)
    failures: list[float] = []

    def work(seed: int) -> None:
        for k in range(8):
            found = error(compiled, model, seed * 100 + k)
            if not found < 0.1:
                failures.append(found)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert is_installed(compiled)


def test_deepcopy_and_pickle_of_a_quantized_model_work(isolated):
    model = Block().eval()
    model.compile(backend="mpq", options=OPTIONS)
    calibrate(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.up.weight.mul_(2)
    assert error(twin, twin) < 0.1
    restored = pickle.loads(pickle.dumps(model))
    with torch.inference_mode():
        assert torch.equal(restored(batch(1)), copy.deepcopy(restored)(batch(1)))
