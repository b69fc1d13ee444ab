"""One plan for calls in several shapes: what a choice saves is the mean over all calls."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

import mpq_fx
from mpq_fx import shapes
from mpq_fx.binding import Binding, sizes_of
from mpq_fx.clock import Clock


class Pooled(nn.Module):
    """`tokens` works on every token, `whole` on the first one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.whole = nn.Linear(32, 32), nn.Linear(32, 512)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.whole(torch.relu(self.tokens(x))[:, 0])


def call(seed: int, tokens: int) -> torch.Tensor:
    return torch.randn(2, tokens, 32, generator=torch.Generator().manual_seed(seed))


LONG = [call(seed, 256) for seed in range(4)]
SHORT = [call(seed, 2) for seed in range(3)]


def tune(batches, **options):
    options = {"target": "reference", "tolerance": 0.1, "formats": ["bfloat16"], **options}
    return mpq_fx.tune(Pooled().eval(), batches, config=mpq_fx.Config(**options), progress=False)


def latencies(plan):
    return plan.tables["latency"].values


def test_each_shape_counts_by_its_calls(isolated):
    long, short, both = tune(LONG), tune(SHORT), tune([*LONG, *SHORT * 4])
    assert latencies(both) == pytest.approx(
        {key: (4 * ms + 12 * latencies(short)[key]) / 16 for key, ms in latencies(long).items()}
    )
    assert both.baseline["latency"] == pytest.approx(
        (4 * long.baseline["latency"] + 12 * short.baseline["latency"]) / 16
    )
    assert "latency of layers is the mean over the calls seen, in 2 shapes" in both.notes
    assert not any("shapes" in note for note in long.notes)


def test_many_short_calls_change_what_is_worth_an_error(isolated):
    """The tolerance allows one of two layers in bfloat16: the one that all calls gain most by."""
    both = tune(LONG)
    singles = both.tables["error"].values
    alone = max(singles[site, "bfloat16"] for site in ("tokens", "whole")) ** 0.5
    assert alone < 0.95 * both.errors["plan"]
    tolerance = (alone + both.errors["plan"]) / 2
    for batches, lowered in ((LONG, "tokens"), ([*LONG, *SHORT * 100], "whole")):
        plan = tune(batches, tolerance=tolerance)
        found = {site for site, choice in plan.choices.items() if choice.name == "bfloat16"}
        assert found == {lowered}


def test_shapes_of_one_graph_are_weighed_too(isolated):
    """Dynamo compiles the second shape for all that follow."""
    several = [call(seed, 8 * (1 + seed % 3)) for seed in range(9)]
    plan = tune(several)
    assert plan.tables["latency"].provenance["shapes"] == 3


def test_a_shape_that_two_codes_ran_is_one_and_the_plans_own_comes_first():
    def code(names, **calls):
        records = [(None, torch.zeros(2, int(n[1:]), 32), 7) for n in calls]
        seen = Counter({sizes_of(r): n for r, n in zip(records, calls.values(), strict=True)})
        binding = Binding((), (), {name: name for name in names}, records, shapes=seen)
        return shapes.Code(None, binding, None)

    own = code("ab", t8=2, t16=3)
    found = shapes.shapes_of((own, code("ab", t8=9, t4=20), code("a", t16=5)), Clock(1.0))
    told = [(shape.record[1].shape[1], shape.calls, shape.code is own) for shape in found]
    assert told == [(8, 11, True), (4, 20, False), (16, 5, False), (16, 3, True)]


def test_shapes_of_few_calls_are_left_out_and_the_plan_says_so(isolated):
    plan = tune([*LONG, *(call(n, n) for n in range(2, 9))])
    assert plan.tables["latency"].provenance["shapes"] == shapes.MOST
    assert any(note.startswith("latency is that of 4 of 8 shapes, ") for note in plan.notes)


def test_without_time_one_shape_is_measured(isolated, monkeypatch):
    monkeypatch.setattr(Clock, "is_past", lambda clock, share=1.0: share >= shapes.ENOUGH)
    plan = tune([*LONG, *SHORT])
    assert plan.tables["latency"].provenance["shapes"] == 1
    assert any("latency of 1 of 2 shapes was measured" in note for note in plan.notes)
