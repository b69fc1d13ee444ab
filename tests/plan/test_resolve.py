"""A plan carries what is needed to solve it again; what comes out is predicted and says so."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from mpq_fx.errors import ConfigError, InfeasibleError, PlanError
from mpq_fx.plan import load, save
from mpq_fx.resolve import frontier, resolve


def named(plan):
    return {unit: choice.name for unit, choice in plan.choices.items()}


def test_a_larger_tolerance_gives_the_faster_plan(small):
    found = resolve(small, tolerance=0.03)
    assert named(found) == {"a": "bfloat16", "b": "bfloat16"}
    predicted = found.provenance["predicted"]
    assert predicted["error"] == pytest.approx(math.sqrt(5e-4))
    assert predicted["latency"] == 15.0 - 10.0 + 3.0  # 5 ms belong to no site
    assert predicted["size"] == 10000.0 - 8000.0 + 4000.0


def test_the_plans_own_budget_stays_unless_it_is_lifted(small):
    assert named(resolve(small))["b"] == "float32"
    lifted = resolve(small, tolerance=None, max_latency=8.0)
    assert named(lifted) == {"a": "bfloat16", "b": "bfloat16"}
    assert lifted.tolerance is None
    assert lifted.budgets == {"max_latency": 8.0}


def test_a_share_is_of_the_float_model(small):
    found = resolve(small, tolerance=None, max_size="0.8x", objective="error")
    assert found.budgets["max_size"] == 8000.0
    assert named(found) == {"a": "bfloat16", "b": "float32"}  # the smaller error of the two


def test_the_scale_that_bisection_found_is_kept(small):
    assert named(resolve(replace(small, error_scale=0.25), tolerance=0.03))["b"] == "float32"
    assert named(resolve(replace(small, error_scale=1.0), tolerance=0.03))["b"] == "bfloat16"


def test_nothing_measured_survives_and_the_notes_say_so(small):
    found = resolve(small, tolerance=0.03)
    assert found.error is None
    assert not found.latency_ms
    assert not found.errors
    assert "not measured" in found.notes[0]
    assert [row.choice for row in found.ledger] == ["bfloat16", "bfloat16"]
    assert [row.kernel for row in found.ledger] == ["k", ""]
    assert found.ledger[1].ms_after == 2.0
    assert found.solver.status == "OPTIMAL"


def test_a_resolved_plan_is_a_plan_and_is_the_same_from_a_file(bert, tmp_path):
    save(bert, tmp_path / "plan.json")
    loaded = resolve(load(tmp_path / "plan.json"), tolerance=0.05)
    assert loaded.choices == resolve(bert, tolerance=0.05).choices
    save(loaded, tmp_path / "again.json")
    assert load(tmp_path / "again.json") == loaded


def test_ties_hold(bert):
    found = resolve(bert, tolerance=0.03)
    assert found.choices != bert.choices
    assert all(len({found.choices[unit] for unit in tie}) == 1 for tie in found.ties)


def test_the_frontier_trades_error_for_latency_and_its_options_reach_each_point(small):
    points = frontier(small)
    assert [p["latency"] for p in points] == sorted(p["latency"] for p in points)
    assert [p["error"] for p in points] == sorted((p["error"] for p in points), reverse=True)
    assert points[0]["latency"] == 8.0
    assert points[-1]["error"] == 0.0
    assert points[-1]["options"] == {}
    for point in points[:-1]:
        reached = resolve(small, **point["options"]).provenance["predicted"]
        assert reached["latency"] <= point["latency"]


def test_the_frontier_of_size_names_the_objective(small):
    assert frontier(small, "size")[0]["options"]["objective"] == "size"


def test_budgets_out_of_reach_are_named_in_the_users_units(small):
    with pytest.raises(InfeasibleError) as caught:
        resolve(small, tolerance=0.01, max_latency=9.0)
    assert str(caught.value).splitlines()[:3] == [
        "no plan meets max_latency <= 9 ms and tolerance <= 0.01",
        "    within reach: max_latency <= 8 ms, max_latency <= 12 ms with the other budgets kept",
        "    within reach: tolerance <= 0, tolerance <= 0.02236 with the other budgets kept",
    ]


def test_what_the_fix_says_can_be_typed(small):
    with pytest.raises(InfeasibleError) as caught:
        resolve(small, tolerance=0.01, max_latency=9.0)
    options = json.loads(caught.value.fix.removeprefix("options="))
    resolve(small, **{"tolerance": 0.01, "max_latency": 9.0, **options})


def test_a_budget_below_what_no_choice_can_change_is_out_of_reach(small):
    with pytest.raises(InfeasibleError, match="5 of it are used by parts"):
        resolve(small, max_latency=4.0)


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"tolerence": 1}, "did you mean 'tolerance'"),
        ({"tolerance": "bf16"}, "not in the tables"),
        ({"tolerance": -1.0}, "tolerance=-1.0"),
        ({"max_bops": 1e9}, "no table of bops"),
        ({"objective": "speed"}, "objective='speed'"),
    ],
)
def test_wishes_that_cannot_be_meant_are_refused(wishes, message, small):
    with pytest.raises(ConfigError, match=message):
        resolve(small, **wishes)


def test_a_plan_without_tables_cannot_be_solved_again(small):
    with pytest.raises(PlanError, match="no error table"):
        resolve(replace(small, tables={}), tolerance=0.1)
    with pytest.raises(ConfigError, match="not a resource"):
        frontier(small, "bops")


def test_plans_have_these_as_methods(small, tmp_path):
    small.save(tmp_path / "plan.json")
    again = type(small).load(tmp_path / "plan.json")
    assert again == small
    assert str(small.diff(again.resolve(tolerance=0.03))).startswith("1 of 2 sites differ")
