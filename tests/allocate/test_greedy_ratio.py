"""Greedy mixed precision: ratios measured where they count, budgets, and what is finished."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq_fx.passes.allocate import SEARCHES, Problem, brute_force, is_feasible, value_of
from mpq_fx.passes.allocate.greedy_ratio import Move, changes_of
from mpq_fx.passes.allocate.groups import groups_of
from tests.allocate.units import OPTIONS, problem_of
from tests.evaluators import evaluator_of, predicted


def greedy_ratio(problem: Problem, evaluator):
    found = SEARCHES["greedy_ratio"].run(problem, evaluator)
    return None if found is None else [*found.solution.assignment.values()]


def test_what_saves_most_for_its_loss_goes_first_as_far_as_the_error_allows():
    problem = problem_of([(0.1, 0.5), (0.1, 5.0), (9.0, 99.0)])
    assert greedy_ratio(problem, predicted(problem, 0.6**0.5)) == ["int8", "bfloat16", "float32"]
    assert greedy_ratio(problem, predicted(problem, 0.25**0.5)) == [
        "bfloat16",
        "bfloat16",
        "float32",
    ]


def test_where_nothing_is_allowed_nothing_moves():
    problem = problem_of([(0.1, 0.5)] * 3)
    assert greedy_ratio(problem, predicted(problem, 0.01)) == ["float32"] * 3


def test_a_budget_is_met_and_not_more_when_the_error_is_the_objective():
    problem = problem_of([(0.1, 0.5), (0.2, 5.0), (0.3, 99.0)], objective="error", size=10.0)
    assert greedy_ratio(problem, predicted(problem, math.inf)) == ["bfloat16", "float32", "float32"]


def test_two_budgets_are_met_before_the_objective_counts():
    problem = problem_of([(0.1, 0.5), (0.2, 5.0), (0.3, 99.0)], size=9.0, latency=8.0)
    found = SEARCHES["greedy_ratio"].run(problem, predicted(problem, 1.0))
    assert is_feasible(problem, found.solution.assignment)
    assert found.error <= 1.0


def test_a_budget_that_the_error_forbids_is_not_met_silently():
    problem = problem_of([(0.1, 0.5)] * 2, size=3.0)
    assert greedy_ratio(problem, predicted(problem, 0.5)) is None


SHARED = {("u0", o, "u1", o): -ms for o, ms in zip(OPTIONS, (4.0, 2.0, 1.0), strict=True)}


def test_a_weight_that_two_units_share_is_left_by_one_after_the_other():
    """Neither of them saves anything while the other one still has the weight in float."""
    problem = problem_of([(0.1, 0.5), (0.2, 0.6)], objective="error", edges=SHARED, latency=2.0)
    assert greedy_ratio(problem, predicted(problem, math.inf)) == ["bfloat16", "bfloat16"]


def test_what_only_costs_more_is_taken_back():
    """The second unit may not follow the first, so that there would be one weight more."""
    problem = problem_of([(0.1, 0.1), (9.0, 9.0)], edges=SHARED)
    assert greedy_ratio(problem, predicted(problem, 1.0)) == ["float32", "float32"]


def test_the_measured_loss_decides_and_not_the_predicted_one():
    """The tables call the first unit harmless; it is the worst."""
    problem = problem_of([(0.1, 0.1), (0.2, 0.2), (0.3, 0.3)])
    true = {"u0": 9.0, "u1": 0.2, "u2": 0.3}
    evaluator = evaluator_of(
        lambda plan: sum(true[u] for u, o in plan.items() if o != "float32") ** 0.5, 0.6**0.5
    )
    assert greedy_ratio(problem, evaluator) == ["float32", "int8", "int8"]


def test_what_was_refused_is_not_asked_again_and_no_plan_twice():
    problem = problem_of([(0.1, 0.5), (0.2, 5.0), (0.3, 99.0)])
    asked: list[dict[str, str]] = []

    def error(plan) -> float:
        asked.append(dict(plan))
        return value_of(problem, "error", plan) ** 0.5

    greedy_ratio(problem, evaluator_of(error, 1.0))
    assert len(asked) == len({tuple(plan.items()) for plan in asked})
    worst = [plan for plan in asked if plan["u2"] == "int8"]
    assert len(worst) <= 1, "99 is more than is allowed beside anything"


def test_what_was_refused_early_is_not_tried_beside_other_plans():
    """The tables call the first unit harmless, so that it is asked about first."""
    problem = problem_of([(0.001, 0.001), (0.2, 0.3), (0.3, 0.4)])
    asked: list[str] = []

    def error(plan) -> float:
        asked.append(plan["u0"])
        return 9.0 if plan["u0"] != "float32" else value_of(problem, "error", plan) ** 0.5

    assert greedy_ratio(problem, evaluator_of(error, 1.0)) == ["float32", "int8", "int8"]
    assert sorted(option for option in asked if option != "float32") == ["bfloat16", "int8"]


def test_a_budget_that_is_met_stays_met():
    problem = problem_of([(0.1, 0.2)], size=4.0)
    size = {("u0", "float32"): 4.0, ("u0", "bfloat16"): 5.0, ("u0", "int8"): 6.0}
    problem = Problem(**{**vars(problem), "resources": {**problem.resources, "size": size}})
    assert greedy_ratio(problem, predicted(problem, 1.0)) == ["float32"]


def test_what_an_option_loses_is_asked_anew_once_its_unit_has_moved():
    """int8 loses 0.7 from float and 0.3 from bfloat16, where it beats what the other unit has."""
    problem = problem_of([(0.4, 0.3), (0.8, 99.0)])
    true = {("u0", "bfloat16"): 0.4, ("u0", "int8"): 0.7, ("u1", "bfloat16"): 0.8}
    evaluator = evaluator_of(
        lambda plan: (
            sum(true.get(item, 99.0) for item in plan.items() if item[1] != "float32") ** 0.5
        ),
        1.25**0.5,
    )
    assert greedy_ratio(problem, evaluator) == ["int8", "float32"]


def test_few_plans_are_asked_where_the_tables_tell_the_truth():
    rows = [(0.01 * (k + 1), 0.05 * (k + 1)) for k in range(12)]
    problem = problem_of(rows)
    asked = []

    def error(plan) -> float:
        asked.append(plan)
        return value_of(problem, "error", plan) ** 0.5

    greedy_ratio(problem, evaluator_of(error, 1.0))
    steps = 2 * 12
    assert len(asked) <= 2 * steps, "all moves in every step would be 24 times 12"


def test_an_interaction_that_the_tables_do_not_know_is_found():
    """Two errors that add up to four times the noise of one; two that cancel."""
    for joint, expected in ((4.0, ["int8", "float32", "int8"]), (0.0, ["int8", "int8", "float32"])):
        problem = problem_of([(1.0, 1.0), (1.0, 1.0), (1.5, 1.5)], objective="error", size=6.0)

        def error(plan, joint=joint) -> float:
            low = [u for u, o in plan.items() if o == "int8"]
            both = {"u0", "u1"} <= set(low)
            alone = sum({"u0": 1.0, "u1": 1.0, "u2": 1.5}[u] for u in low)
            return (alone + (joint - 2.0 if both else 0.0)) ** 0.5

        only_int8 = dict.fromkeys(problem.options, ("float32", "int8"))
        table = {k: v for k, v in problem.error.items() if k[1] != "bfloat16"}
        size = {k: v for k, v in problem.resources["size"].items() if k[1] != "bfloat16"}
        small = Problem(
            only_int8, table, ("error",), resources={"size": size}, budgets={"size": 6.0}
        )
        assert greedy_ratio(small, evaluator_of(error, math.inf)) == expected


def test_a_drop_is_no_noise_power():
    """Drops add up by themselves: of equal savings the smaller drop goes first."""
    problem = problem_of([(0.1, 0.1), (0.1, 0.1)])
    drops = {"u0": 0.006, "u1": 0.005}
    evaluator = evaluator_of(
        lambda plan: sum(drops[u] for u, o in plan.items() if o != "float32"),
        0.0055,
        yardstick=0.5,
        exponent=1,
    )
    assert greedy_ratio(problem, evaluator) == ["float32", "int8"]


def test_tied_units_move_together():
    problem = problem_of([(1.0, 1.0), (1.0, 1.0), (1.5, 1.5)], ties=(("u0", "u1"),))
    assert greedy_ratio(problem, predicted(problem, 1.7**0.5)) == ["float32", "float32", "int8"]


def test_once_time_is_over_budgets_are_met_by_prediction():
    problem = problem_of([(0.1, 0.5), (0.2, 5.0), (0.3, 99.0)], objective="error", size=10.0)
    asked = []

    def error(plan) -> float:
        asked.append(plan)
        return value_of(problem, "error", plan) ** 0.5

    evaluator = evaluator_of(error, math.inf, is_past=lambda: True)
    assert greedy_ratio(problem, evaluator) == ["bfloat16", "float32", "float32"]
    assert len(asked) == 1
    free = problem_of([(0.1, 0.5)] * 2)
    evaluator = predicted(free, 1.0, is_past=lambda: True)
    assert greedy_ratio(free, evaluator) == ["float32", "float32"]


@given(st.data(), st.integers(1, 4), st.floats(0.1, 3.0), st.floats(0.3, 1.0))
def test_what_is_found_keeps_every_limit_and_is_no_better_than_the_best(data, count, limit, share):
    noise = st.floats(0, 2)
    rows = [(data.draw(noise), data.draw(noise)) for _ in range(count)]
    pairs = {
        (f"u{k}", o, f"u{k + 1}", p): data.draw(st.floats(0, 1))
        for k in range(count - 1)
        for o in OPTIONS[1:]
        for p in OPTIONS[1:]
    }
    edges = {(*key[:1], "float32", *key[2:]): 0.25 for key in pairs}
    problem = problem_of(rows, pairs=pairs, edges=edges, size=4.0 * count * share)
    found = SEARCHES["greedy_ratio"].run(problem, predicted(problem, limit))
    if found is None:
        return
    assert is_feasible(problem, found.solution.assignment)
    assert found.error <= limit
    asked = Problem(
        **{**vars(problem), "budgets": {**problem.budgets, "error": (limit * (1 + 1e-9)) ** 2}}
    )
    best = brute_force.solve(asked)
    assert found.solution.values["latency"] >= best.values["latency"] - 1e-9
    assert found.solution.bound <= best.values["latency"] + 1e-9


@given(st.data(), st.integers(1, 4), st.booleans())
def test_what_a_move_adds_is_the_difference_of_two_plans(data, count, tied):
    pick = st.sampled_from(OPTIONS)
    units = [f"u{k}" for k in range(count)]
    terms = {
        (u, data.draw(pick), v, data.draw(pick)): data.draw(st.floats(-2, 2))
        for k, u in enumerate(units)
        for v in units[k + 1 :]
    }
    ties = (("u0", f"u{count - 1}"),) if tied and count > 1 else ()
    problem = problem_of([(0.1, 0.2)] * count, pairs=terms, edges=terms, ties=ties)
    members = {g.members[0]: g.members for g in groups_of(problem)}
    changes = changes_of(problem, members)
    plan = {unit: data.draw(pick) for unit in units}
    plan |= dict.fromkeys(ties[0], plan["u0"]) if ties else {}
    move = Move(data.draw(st.sampled_from([*members])), data.draw(pick))
    for name in ("error", "latency", "size"):
        added = value_of(problem, name, changes.after(plan, move)) - value_of(problem, name, plan)
        assert changes.of(name, plan, move) == pytest.approx(added, abs=1e-12)
