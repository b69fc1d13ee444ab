"""One plan for one model: across graph breaks, recompilations, dynamic shapes and many models."""

from __future__ import annotations

import torch

import mpq_fx
from mpq_fx.numerics import relative_rms


def error(compiled, model, x) -> float:
    with torch.inference_mode():
        return relative_rms(compiled(x), model(x))


def test_another_batch_size_joins_the_plan_without_calibration(isolated, world):
    model = world.Net()
    compiled = world.quantized(model)
    (first,) = world.bindings(compiled)
    for size in (7, 9, 1):
        assert 0 < error(compiled, model, world.batch(1, size)) < 0.1
    bindings = world.bindings(compiled)
    assert len(bindings) > 1
    assert all(binding.plan is first.plan for binding in bindings)
    assert all(
        not binding.calls and not binding.records for binding in bindings if binding is not first
    )


def test_graphs_on_both_sides_of_a_break_are_one_plan_in_tune(isolated, world):
    model = world.Broken().eval()
    batches = [world.batch(k) for k in range(4)]
    plan = mpq_fx.tune(model, batches, config=world.config(), progress=False)
    assert set(plan.choices) == {"query", "up", "down"}
    assert len(plan.ledger) == 3
    assert plan.baseline["bits"] == 32.0, "the mean over all weights, not a sum over graphs"
    compiled = mpq_fx.apply(model, plan)
    assert 0 < error(compiled, model, world.batch(9)) < 0.1
    assert {binding.plan.winner for binding in world.bindings(compiled)} == {"plan"}
    assert [entry.label for entry in mpq_fx.explain(compiled).entries] == ["graphs 0, 1"]


def test_symbolic_sizes_from_the_start_run_one_graph(isolated, world):
    model = world.Net().eval()
    compiled = torch.compile(model, backend="mpq", options=world.options, dynamic=True)
    with torch.inference_mode():
        for k, size in enumerate((3, 4, 5, 6)):
            compiled(world.batch(k, size))
    (binding,) = world.bindings(compiled)
    assert binding.reason == ""
    assert 0 < error(compiled, model, world.batch(8, 11)) < 0.1
    assert len(world.bindings(compiled)) == 1


def test_tuning_again_and_again_does_not_meet_the_recompile_limit(isolated, world):
    """Dynamo counts compilations by code; earlier plans must not push later ones to eager."""
    model = world.Net().eval()
    config = world.config(formats=["bfloat16"])
    batches = [world.batch(k) for k in range(3)]
    with torch._dynamo.config.patch(recompile_limit=1):  # noqa: TID251
        for _ in range(2):
            plan = mpq_fx.tune(model, batches, config=config, progress=False)
        compiled = [mpq_fx.apply(model, plan) for _ in range(2)]
        assert all(0 < error(each, model, world.batch(5)) < 0.1 for each in compiled)
    assert mpq_fx.explain(compiled[0]).dynamo["recompile_limit"] == 0
