"""Models come and go, threads call and edit them at once: nothing stays, and nothing is stale."""

from __future__ import annotations

import errno
import gc
import json
import threading
import time
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

import mpq_fx
from mpq_fx import backend, binding, compiler, passes
from mpq_fx.errors import InfeasibleError, WeightError
from mpq_fx.lifecycle import LIFECYCLES, Known
from mpq_fx.numerics import relative_rms
from mpq_fx.passes.analyze.cost import read, write
from mpq_fx.passes.lower.inductor import ALL, compile_frozen
from mpq_fx.passes.lower.reference import REFERENCE
from mpq_fx.registry import bindings_of

OPTIONS = {
    "target": "reference",
    "objective": "size",
    "tolerance": 0.2,
    "calibration_calls": 3,
    "formats": ["int8"],
}
CONFIG = mpq_fx.Config(**OPTIONS)


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def batch(seed: int) -> torch.Tensor:
    return torch.randn(8, 32, generator=torch.Generator().manual_seed(seed))


def observed(model: nn.Module, calls: int = 4, **options):
    compiled = torch.compile(model.eval(), backend="mpq", options={**OPTIONS, **options})
    with torch.inference_mode():
        for seed in range(calls):
            compiled(batch(seed))
    return compiled


def error(compiled, model: nn.Module) -> float:
    with torch.inference_mode():
        return relative_rms(compiled(batch(9)), model(batch(9)))


def in_thread(call) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


def edit(model: Net) -> None:
    """What another thread does: a checkpoint of other weights."""
    in_thread(lambda: model.load_state_dict(Net(1).state_dict()))


@pytest.mark.onednn
@pytest.mark.parametrize("mode", ["", ALL])
def test_constants_live_no_longer_than_the_code_that_inductor_made_for_them(isolated, mode):
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("constant", torch.randn(32, 48))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x @ self.constant)

    module = Product()
    gm = torch.fx.symbolic_trace(module)
    x, alive = torch.randn(4, 32), weakref.ref(module.constant)
    compiled = compile_frozen(gm, [x], mode)
    with torch.no_grad():
        torch.testing.assert_close(compiled.run(x), module(x))
    del module, gm
    gc.collect()
    assert alive() is not None
    del compiled
    torch.compiler.reset()
    gc.collect()
    assert alive() is None


def test_an_edit_while_constants_are_computed_again_is_seen_on_the_next_call(isolated, monkeypatch):
    model = Net()
    compiled, evaluate, edits = observed(model), binding.evaluate, [lambda: edit(model)]

    def edited_behind(*args):
        found = evaluate(*args)
        if edits:
            edits.pop()()
        return found

    monkeypatch.setattr(binding, "evaluate", edited_behind)
    with torch.no_grad():
        model.up.weight.mul_(1.1)
    with torch.inference_mode():
        compiled(batch(9))
    assert not edits
    assert 0 < error(compiled, model) < 0.2


def test_an_edit_while_the_plan_is_solved_counts_in_the_first_call_of_the_plan(
    isolated, monkeypatch
):
    model, describe = Net(), compiler.describe

    def edited_before(*args):
        edit(model)
        return describe(*args)

    monkeypatch.setattr(compiler, "describe", edited_before)
    compiled = observed(model)
    ((_, bound),) = bindings_of(compiled)
    assert bound.installed is not None
    assert 0 < error(compiled, model) < 0.2


def test_a_plan_that_failed_over_weights_edited_meanwhile_can_be_made_later(isolated, monkeypatch):
    model = Net()
    compiled = observed(model, calls=2)
    with monkeypatch.context() as patch, torch.inference_mode():

        def search(*args):
            edit(model)
            raise InfeasibleError("no plan that was tried has an error of at most 0.2")

        patch.setattr(compiler, "search", search)
        with pytest.raises(
            WeightError, match="were edited while their plan was made: no plan"
        ) as e:
            compiled(batch(5))
    assert e.value.fix == "mpq_fx.finalize(model) when no thread edits them"
    assert error(compiled, model) == 0
    mpq_fx.finalize(compiled)
    assert 0 < error(compiled, model) < 0.2


def test_graphs_of_one_tune_answer_no_other_of_the_same_options(isolated, monkeypatch):
    """As in two threads: what keeps compilations apart in PyTorch holds for the process."""
    compile_, model = torch.compile, Net().eval()

    def shared(model, *, backend, options):
        return compile_(model, backend=backend, options=options)

    monkeypatch.setattr(torch, "compile", shared)
    config = mpq_fx.Config(**OPTIONS, cache_dir="of this test")
    for count in (1, 2):
        compiled = backend.compile_apart(model, config=config)
        with torch.inference_mode():
            compiled(batch(0))
        assert sum(lifecycle.config == config for lifecycle in LIFECYCLES) == count


def test_a_thread_may_add_what_another_one_looks_through():
    class Each:
        pass

    known, kept = Known[Each](), [Each() for _ in range(5)]
    for each in kept[:3]:
        known.add(each)
    found = []
    for each in known:
        found.append(each)
        known.add(kept[3])
        known.discard(kept[0])
    assert set(found) == set(kept[:3])
    assert set(known) == set(kept[1:4])


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_latencies_that_find_no_room_leave_nothing_behind(tmp_path, monkeypatch):
    path = tmp_path / "latency.json"
    write(path, {"a": 1.0})
    monkeypatch.setattr(json, "dump", full)
    write(path, {"a": 2.0})
    assert read(path) == {"a": 1.0}
    assert list(tmp_path.iterdir()) == [path]


def test_one_thread_compiles_at_a_time(isolated, monkeypatch):
    """What Inductor and FX are at is known to the process, not to the thread."""
    compile_ = REFERENCE.compile
    begun, entered = threading.Barrier(2, timeout=60), threading.Semaphore(1)
    overlaps = []

    def slow(gm, inputs, mode):
        if not entered.acquire(blocking=False):
            overlaps.append(mode)
            return compile_(gm, inputs, mode)
        time.sleep(0.05)
        entered.release()
        return compile_(gm, inputs, mode)

    monkeypatch.setattr(passes, "TARGETS", (replace(REFERENCE, compile=slow),))
    compiled = [observed(Net(seed), calls=2) for seed in range(2)]

    def solve(each) -> None:
        begun.wait()
        mpq_fx.finalize(each)

    threads = [threading.Thread(target=solve, args=(each,)) for each in compiled]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(b.installed is not None for each in compiled for _, b in bindings_of(each))
    assert overlaps == []


def test_a_model_that_is_dropped_is_freed_with_its_constants(isolated):
    model = Net()
    compiled = observed(model)
    ((_, bound),) = bindings_of(compiled)
    constants = [getattr(bound.installed.constants, r.name) for r in bound.installed.recipes]
    alive = [weakref.ref(x) for x in (model, model.up.weight, *constants)]
    del model, compiled, bound, constants, _
    gc.collect()
    assert [x() for x in alive] == [None] * len(alive)


@pytest.mark.parametrize("rows", [0, 3])
def test_a_shape_that_a_mode_has_no_code_for_runs_without_it(isolated, monkeypatch, caplog, rows):
    """Inductor's matmul templates take no empty batch, nor a vector."""
    compilers = ["second"]

    def modes(gm, inputs, mode):
        if mode and not compilers:
            raise ValueError("not enough values to unpack")
        return REFERENCE.compile(gm, inputs, mode)

    target = replace(REFERENCE, is_timed=True, modes=lambda planned: ("second",), compile=modes)
    monkeypatch.setattr(passes, "TARGETS", (target,))
    model = Net().eval()
    plan = mpq_fx.tune(model, [batch(k) for k in range(4)], config=CONFIG, progress=False)
    plan = replace(plan, ledger=tuple(replace(row, mode="second") for row in plan.ledger))
    compiled, x = mpq_fx.apply(model, plan), batch(0)[:rows]
    compilers.clear()
    with torch.inference_mode():
        found, expected = compiled(x), model(x)
    assert found.shape == expected.shape
    assert (found - expected).norm() <= 0.2 * expected.norm()
    assert "does not compile with second in this shape" in caplog.text


VIEWS = {
    "expanded": lambda: torch.randn(1, 32).expand(8, 32),
    "every second": lambda: torch.randn(16, 64)[::2, ::2],
    "overlapping": lambda: torch.randn(100).as_strided((8, 32), (3, 1), 5),
    "transposed": lambda: torch.randn(32, 8).t(),
    "empty": lambda: torch.randn(16, 64)[:0, ::2],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_a_copied_input_has_the_strides_that_code_was_compiled_for(view):
    x = view()
    copy = binding.copied(x)
    assert (copy.shape, copy.stride()) == (x.shape, x.stride())
    assert torch.equal(copy, x)
    assert not x.numel() or copy.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@pytest.mark.onednn
def test_a_model_is_planned_on_expanded_inputs(isolated):
    model = Net().eval()
    options = {**OPTIONS, "target": "cpu", "time_budget": 0.5, "tolerance": 0.5}
    compiled = torch.compile(model, backend="mpq", options=options)
    with torch.inference_mode():
        for seed in range(4):
            compiled(batch(seed)[:1].expand(8, 32))
        x = batch(9)[:1].expand(8, 32)
        assert relative_rms(compiled(x), model(x)) < 0.5
    assert [bound.reason for _, bound in bindings_of(compiled)] == [""]
