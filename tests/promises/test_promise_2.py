"""Never worse: the plan is raced against float and uniform plans, all lowered equally well."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import mpq_fx
from mpq_fx import passes, settle
from mpq_fx.numerics import relative_rms
from mpq_fx.passes.lower.reference import REFERENCE
from mpq_fx.registry import bindings_of
from mpq_fx.verify import MARGIN, timing

VARIANTS = {"plan", "inductor float", "all float", "all bfloat16", "all int8"}


@pytest.fixture
def race(monkeypatch):
    """The reference as a timed target, and a race whose times the test sets."""
    monkeypatch.setattr(passes, "TARGETS", (replace(REFERENCE, is_timed=True),))
    times: dict[str, float] = {}
    ran: list[str] = []

    def fake(variants):
        for call in variants.values():
            call()
        ran.extend(variants)
        return {name: timing([times.get(name, 10.0)]) for name in variants}

    monkeypatch.setattr(settle, "race", fake)
    monkeypatch.setattr(settle, "HOPELESS", float("inf"))  # the reference's latencies are bits
    return times, ran


@pytest.fixture
def tuned(world, race):
    def tune(**times):
        race[0].update({name.replace("_", " "): ms for name, ms in times.items()})
        model = world.Net().eval()
        batches = [world.batch(k) for k in range(4)]
        config = world.config(tolerance=0.5)
        return mpq_fx.tune(model, batches, config=config, progress=False)

    return tune


def test_the_plan_races_float_and_every_uniform_plan(isolated, tuned, race):
    plan = tuned()
    assert set(race[1]) == VARIANTS
    assert plan.winner == "plan"
    assert set(plan.latency_ms) == VARIANTS
    assert set(plan.errors) == VARIANTS


@pytest.mark.parametrize("name", ["all_int8", "all_bfloat16", "inductor_float"])
def test_a_simpler_plan_that_is_clearly_faster_runs_and_the_notes_say_so(isolated, tuned, name):
    plan = tuned(**{name: 8.0})
    assert plan.winner == name.replace("_", " ")
    assert any("so it runs" in note for note in plan.notes)
    rows = {row.choice for row in plan.ledger if row.site.op == "linear"}
    if name == "inductor_float":
        assert rows == {"float32"}
        assert plan.error == 0.0
    elif name == "all_bfloat16":
        assert rows == {"bfloat16"}
    else:
        assert all(row.startswith("int8") for row in rows)


def test_less_than_the_margin_is_no_reason_to_change(isolated, tuned):
    assert tuned(all_int8=10.0 * (1 - MARGIN / 2)).winner == "plan"


def test_a_simpler_plan_of_far_larger_predicted_latency_is_not_compiled(
    isolated, monkeypatch, tuned, race
):
    monkeypatch.setattr(settle, "HOPELESS", 1.5)
    plan = tuned()
    ms = plan.tables["latency"].values
    cost = {unit: ms[unit, choice.name] for unit, choice in plan.choices.items()}
    assert sum(ms[unit, "float32"] for unit in cost) > 1.5 * sum(cost.values())
    assert "all float" not in race[1]
    assert {"plan", "inductor float"} <= set(race[1])


def test_all_bfloat16_races_whatever_its_predicted_latency_and_the_clock(
    isolated, monkeypatch, tuned, race
):
    monkeypatch.setattr(settle, "HOPELESS", 0.0)
    monkeypatch.setattr(settle, "SIMPLER_PLAN", -1.0)
    tuned()
    assert set(race[1]) == {"plan", "all bfloat16", "inductor float"}


@pytest.fixture
def two_modes(race, monkeypatch) -> None:
    """A target that compiles in two modes, each of which can be finished."""
    target = replace(
        REFERENCE,
        is_timed=True,
        modes=lambda planned: ("first", "second"),
        finishing=lambda mode, sites, ms: (
            () if mode.endswith("finished") else (f"{mode}, finished",)
        ),
    )
    monkeypatch.setattr(passes, "TARGETS", (target,))


def test_a_latency_that_the_race_does_not_keep_is_a_note(isolated, world, race):
    race[0].update(dict.fromkeys(VARIANTS, 25.0))
    config = world.config(tolerance=0.5, max_latency=20.0)
    batches = [world.batch(k) for k in range(4)]
    plan = mpq_fx.tune(world.Net().eval(), batches, config=config, progress=False)
    assert any("a call takes 25 ms, above max_latency=20" in note for note in plan.notes)
    assert plan.baseline["latency"] < 20.0, "milliseconds of a call, not of the reference's bits"


def test_float_that_won_stays_float_when_the_plan_is_loaded(isolated, world, tuned):
    plan = tuned(inductor_float=8.0)
    assert {row.mode for row in plan.ledger} == {"inductor float"}
    model = world.Net().eval()
    compiled = mpq_fx.apply(model, plan)
    x = world.batch(9)
    with torch.inference_mode():
        assert relative_rms(compiled(x), model(x)) < 1e-5
    ((_, binding),) = bindings_of(compiled)
    assert (binding.installed, binding.reason) == (None, "no allowed plan is faster than float")
    solved = plan.resolve(tolerance=0.4)
    assert {row.mode for row in solved.ledger} == {""}, "another plan has not lost that race"


def test_what_wins_is_finished_compiled_in_the_other_modes_and_finished_there(
    isolated, two_modes, tuned, race
):
    """Modes are raced again with everything else; the last ones follow from what won."""
    plan = tuned(**{"plan, second": 8.0, "plan, second, finished": 7.0})
    assert plan.winner == "plan, second, finished"
    assert {row.mode for row in plan.ledger} == {"second, finished"}
    assert race[1].count("plan, first") == 4
    assert race[1].count("plan, first, finished") == 3


def test_all_bfloat16_gets_its_other_modes_if_it_is_near(isolated, two_modes, tuned, race):
    near, far = 10.0 * settle.CLOSE - 0.1, 10.0 * settle.CLOSE + 0.1
    fast = {"all bfloat16, second": 5.0}
    assert tuned(**{"all bfloat16, first": near}, **fast).winner == "all bfloat16, second"
    assert tuned(**{"all bfloat16, first": far}, **fast).winner == "plan, first"


def test_a_mode_that_does_not_compile_takes_nothing_from_the_winner(isolated, monkeypatch, tuned):
    def compile_in_mode(gm, inputs, mode):
        if mode == "broken":
            raise RuntimeError("no such instruction\nat line 7")
        return REFERENCE.compile(gm, inputs, mode)

    target = replace(
        REFERENCE, is_timed=True, modes=lambda planned: ("", "broken"), compile=compile_in_mode
    )
    monkeypatch.setattr(passes, "TARGETS", (target,))
    plan = tuned()
    assert plan.winner == "plan"
    assert "'plan' did not compile with broken: no such instruction" in plan.notes


def test_a_mode_that_computes_something_else_is_told_and_left(isolated, monkeypatch, tuned):
    def compile_in_mode(gm, inputs, mode):
        made = REFERENCE.compile(gm, inputs, mode)
        if mode != "wrong":
            return made
        return replace(made, run=lambda *args: [3.0 * y for y in made.run(*args)])

    target = replace(
        REFERENCE, is_timed=True, modes=lambda planned: ("wrong",), compile=compile_in_mode
    )
    monkeypatch.setattr(passes, "TARGETS", (target,))
    plan = tuned()
    assert plan.winner == "plan"
    assert {row.mode for row in plan.ledger} == {""}
    assert any(
        note.startswith("with wrong the plan computed something else") for note in plan.notes
    )
    assert plan.errors["plan"] <= plan.tolerance


def test_a_faster_plan_above_the_tolerance_is_not_raced(isolated, world, race):
    race[0]["all int8"] = 1.0
    batches = [world.batch(k) for k in range(4)]
    config = world.config(tolerance=0.002)
    plan = mpq_fx.tune(world.Net().eval(), batches, config=config, progress=False)
    assert plan.errors["all int8"] > plan.tolerance
    assert "all int8" not in race[1]
    assert plan.winner != "all int8"


@pytest.mark.onednn
def test_on_the_cpu_what_runs_is_the_fastest_that_is_allowed(isolated, world):
    class Wide(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(
                torch.nn.Linear(256, 512), torch.nn.ReLU(), torch.nn.Linear(512, 256)
            )

        def forward(self, x):
            return self.net(x)

    model = Wide()
    compiled = torch.compile(
        model.eval(), backend="mpq", options={"calibration_calls": 3, "tolerance": 0.1}
    )
    x = torch.randn(64, 256)
    with torch.inference_mode():
        for scale in (1.0, 0.9, 1.1):
            compiled(x * scale)
        (binding,) = world.bindings(compiled)
        plan = binding.plan
        assert "inductor float" in plan.latency_ms
        best = min(plan.latency_ms.values())
        assert plan.latency_ms[plan.winner] <= best / (1 - MARGIN) + 1e-9
        assert relative_rms(compiled(x), model(x)) <= 0.11
