"""Trade-offs: predicted, replayed, without what others beat, and a plan for each."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import mpq_fx
from mpq_fx.front import front_of, seen_error, undominated
from tests.plan.conftest import FLOAT


def points(*pairs: tuple[float, float, float | None]) -> list[dict]:
    made = [{"resource": "size", "size": cost, "error": guess} for cost, guess, _ in pairs]
    return [
        p if seen is None else {**p, "measured": seen}
        for p, (_, _, seen) in zip(made, pairs, strict=True)
    ]


def test_a_point_that_another_beats_by_what_was_measured_is_left_out():
    found = undominated(
        points((1, 0.9, None), (2, 0.5, 1.1), (3, 0.4, 0.45), (3, 0.3, 0.5)), "size"
    )
    assert [(p["size"], seen_error(p)) for p in found] == [(1, 0.9), (3, 0.45)]
    assert undominated(points((1, 0.9, None)), "latency") == []


def test_the_plan_of_a_point_keeps_what_the_point_says(small):
    points = (*small.frontier("latency"), *small.frontier("size"))
    front = front_of(replace(small, points=points))
    assert {point["resource"] for point in front.points} == {"latency", "size"}
    for point in front.points:
        plan = front.plan_at(point)
        predicted = plan.provenance["predicted"]
        assert predicted["error"] == pytest.approx(point["error"])
        assert predicted[point["resource"]] == pytest.approx(point[point["resource"]])
    assert all(
        choice.weight == FLOAT for choice in front.plan_at(front.points[-1]).choices.values()
    )


def test_pareto_measures_every_point_and_tells_what_to_type(isolated):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.GELU(), torch.nn.Linear(48, 32))
    batches = [torch.randn(8, 32) for _ in range(8)]
    config = mpq_fx.Config(target="reference", calibration_calls=3)
    front = mpq_fx.pareto(net.eval(), batches, config=config, progress=False)
    small = [point for point in front.points if point["resource"] == "size"]
    assert len(small) > 2
    assert all(a["size"] < b["size"] for a, b in pairwise(small))
    assert small[-1]["measured"] == small[-1]["error"] == 0.0
    for point in small[:-1]:
        assert point["options"]["objective"] == "size"
        assert 0.2 < point["measured"] / point["error"] < 5
    chosen = front.plan_at(small[0])
    with torch.inference_mode():
        x = torch.randn(8, 32)
        error = (mpq_fx.apply(net, chosen)(x) - net(x)).norm() / net(x).norm()
    assert 0.2 < error / small[0]["measured"] < 5
    shown = str(front).splitlines()
    assert len(shown) == 1 + len(front.points)
    assert str(small[0]["options"]) in str(front)
