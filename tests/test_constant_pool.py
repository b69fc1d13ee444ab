"""Graphs of one model, such as prefill and decode, read one copy of what they pack."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

import mpq_fx
from mpq_fx import constant_pool
from mpq_fx.numerics import relative_rms
from mpq_fx.registry import bindings_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TARGETS = ["reference", "triton"]


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def compiled(model: nn.Module, target: str = "reference"):
    """Run in int8, in two graphs: of one row, and of sixteen."""
    if target == "triton":
        pytest.importorskip("triton")
    options = {"target": target, "formats": ["int8"], "tolerance": 0.2, "objective": "size"}
    options["calibration_calls"] = 3
    found = torch.compile(model.eval().to(DEVICE), backend="mpq", dynamic=False, options=options)
    with torch.inference_mode():
        for seed in range(4):
            for rows in (1, 16):
                found(batch(rows, seed))
    return found


def batch(rows: int, seed: int = 9) -> torch.Tensor:
    return torch.randn(rows, 32, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def constants(found) -> list[dict[str, torch.Tensor]]:
    graphs = [binding.installed for _, binding in bindings_of(found)]
    assert all(graph is not None for graph in graphs)
    return [{r.name: getattr(g.constants, r.name) for r in g.recipes} for g in graphs]


def error(found, model: nn.Module, rows: int) -> float:
    with torch.inference_mode():
        return relative_rms(found(batch(rows)), model(batch(rows)))


@pytest.mark.parametrize("target", TARGETS)
def test_graphs_of_other_shapes_share_what_is_packed(isolated, target):
    one, many = constants(compiled(Net(), target))
    assert len(one) == len(many) > 2
    assert {x.data_ptr() for x in one.values()} == {x.data_ptr() for x in many.values()}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("order", [(1, 16), (16, 1)], ids=str)
def test_an_edit_reaches_each_graph_whichever_is_called_first(isolated, target, order):
    model = Net()
    found = compiled(model, target)
    before = [error(found, model, rows) for rows in order]
    with torch.no_grad():
        model.up.weight.mul_(-3.0)
        model.down.weight.add_(0.2)
    assert all(error(found, model, rows) < 0.05 for rows in (*order, *order))
    assert all(e < 0.05 for e in before)


def test_a_graph_that_joins_after_an_edit_leaves_nothing_stale(isolated):
    """The first graph was not called since: its constants are older than the weights."""
    model = Net()
    found = compiled(model)
    with torch.no_grad():
        model.up.weight.mul_(-3.0)
    assert error(found, model, 7) < 0.05, "a new graph"
    assert len(constants(found)) == 3
    assert all(error(found, model, rows) < 0.05 for rows in (1, 16, 7))
    pointers = [{x.data_ptr() for x in graph.values()} for graph in constants(found)]
    assert pointers[0] == pointers[1] == pointers[2]


def test_an_edit_behind_the_back_of_autograd_reaches_every_graph_by_a_refresh(isolated):
    model = Net()
    found = compiled(model)
    model.down.weight.data[3] *= -2.0
    mpq_fx.refresh(found)
    assert all(error(found, model, rows) < 0.05 for rows in (1, 16))


def test_models_of_other_weights_share_nothing(isolated):
    first, second = (constants(compiled(Net(seed)))[0] for seed in (1, 2))
    assert not {x.data_ptr() for x in first.values()} & {x.data_ptr() for x in second.values()}


def test_what_nobody_reads_is_forgotten(isolated):
    constant_pool.POOL.clear()
    found = compiled(Net())
    known = len(constant_pool.POOL)
    assert known >= len(constants(found)[0])
    del found
    torch.compiler.reset()
    gc.collect()
    constants(compiled(Net(1)))
    assert len(constant_pool.POOL) <= known


def test_a_parameter_that_took_the_identity_of_a_dead_one_finds_nothing(isolated):
    model = Net()
    found = compiled(model)
    other = torch.zeros(1)
    for key, entry in constant_pool.POOL.items():
        dead = tuple(weakref.ref(other) for _ in entry.parameters)
        constant_pool.POOL[key] = constant_pool.Entry(entry.constant, dead)
    error(found, model, 7)
    first, _, late = constants(found)
    assert not {x.data_ptr() for x in first.values()} & {x.data_ptr() for x in late.values()}


@pytest.mark.parametrize("how", ["counted", "behind"])
def test_an_edit_that_is_taken_back_before_the_other_graph_is_called_leaves_it_right(isolated, how):
    """Its own watch sees weights as it knows them, and the constants were written twice."""
    model = Net()
    found = compiled(model)
    for factor in (-4.0, -0.25):
        with torch.no_grad():
            (model.up.weight if how == "counted" else model.up.weight.data).mul_(factor)
        if factor == -4.0:
            with torch.inference_mode():
                one = bindings_of(found)[0][1]
                found(batch(1))
                one.refresh()
    assert error(found, model, 16) < 0.05
    assert error(found, model, 1) < 0.05


def test_graphs_that_are_called_by_turns_compute_an_edited_constant_once_each(
    isolated, monkeypatch
):
    model = Net()
    found = compiled(model)
    with torch.no_grad():
        model.up.weight.mul_(-3.0)
    computed = []
    for _, binding in bindings_of(found):
        plain = binding.update
        monkeypatch.setattr(binding, "update", lambda *a, f=plain: (computed.append(1), f(*a)))
    for rows in (1, 16) * 3:
        assert error(found, model, rows) < 0.05
    assert len(computed) == 2


def test_a_weight_that_takes_the_place_of_another_and_back_is_the_one_that_runs(isolated):
    """A parameter assigned anew, in the end of contents that the second graph has seen before."""
    model = Net()
    found = compiled(model)
    first = model.up.weight.detach().clone()
    for weight, rows in ((first * -3, 1), (first, 16), (first, 1)):
        model.up.weight = nn.Parameter(weight.clone())
        gc.collect()
        assert error(found, model, rows) < 0.05
