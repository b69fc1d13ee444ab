"""Refining finds what measured errors say is best, whatever the table says."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq_fx.passes.allocate import Problem, Solution, cp_sat, is_feasible, value_of
from mpq_fx.passes.allocate.refine import Tried, best_of, corrected, refined, suggested

OPTIONS = dict.fromkeys("abcd", ("w8", "w4"))
POWER = st.integers(1, 1000).map(lambda n: n / 100)
OFF = st.integers(-60, 150).map(lambda n: 1 + n / 100)


@st.composite
def worlds(draw, objective=("error",)):
    """A problem, and a measured error of each plan that no table of singles can express."""
    error = {(u, o): draw(POWER) * (o == "w4") for u, kept in OPTIONS.items() for o in kept}
    bits = {(u, o): 8.0 if o == "w8" else 4.0 for u, kept in OPTIONS.items() for o in kept}
    pairs = {("a", "w4", "b", "w4"): draw(POWER) - 5.0}
    budgets = {"bits": float(4 * draw(st.integers(4, 8)))} if "bits" not in objective else {}
    if "bits" in objective:
        budgets["error"] = draw(POWER)
    problem = Problem(
        OPTIONS, error, objective, pairs=pairs, resources={"bits": bits}, budgets=budgets
    )
    true = {u: draw(OFF) for u in OPTIONS}
    measured = {}
    for picks in itertools.product(*OPTIONS.values()):
        plan = dict(zip(OPTIONS, picks, strict=True))
        power = sum(true[u] * error[u, o] for u, o in plan.items())
        measured[picks] = max(
            0.0,
            power + value_of(problem, "error", plan) - sum(error[item] for item in plan.items()),
        )
    return problem, measured


def search(problem, measured, rounds) -> tuple[Tried, ...]:
    def measure(plan: Mapping[str, str]) -> float:
        return measured[tuple(plan[u] for u in OPTIONS)]

    first = cp_sat.solve(problem)
    return refined(
        problem, cp_sat.solve, measure, [Tried(first, measure(first.assignment))], rounds=rounds
    )


@settings(max_examples=60)
@given(worlds())
def test_with_enough_rounds_the_least_measured_error_is_found(world):
    problem, measured = world
    found = best_of(problem, search(problem, measured, rounds=16))
    within = [
        error
        for picks, error in measured.items()
        if is_feasible(problem, dict(zip(OPTIONS, picks, strict=True)))
    ]
    assert found.error == pytest.approx(min(within))


@settings(max_examples=60)
@given(worlds(objective=("bits", "error")))
def test_no_plan_is_measured_twice_and_only_admissible_ones_win(world):
    problem, measured = world
    tried = search(problem, measured, rounds=16)
    plans = [tuple(sorted(each.solution.assignment.items())) for each in tried]
    assert len(plans) == len(set(plans))
    found = best_of(problem, tried)
    assert found is None or found.error <= problem.budgets["error"] * (1 + 1e-9)
    if found is not None:
        allowed = [t for t in tried if t.error <= problem.budgets["error"]]
        assert found.value == min(t.value for t in allowed)


@given(worlds())
def test_a_table_that_was_right_stays_as_it_is(world):
    problem, _ = world
    solution = cp_sat.solve(problem)
    same = corrected(problem, [Tried(solution, solution.values["error"])])
    assert same.error == pytest.approx(dict(problem.error))
    assert same.pairs == pytest.approx(dict(problem.pairs))


def test_what_a_plan_measured_is_what_the_corrected_table_predicts_of_it():
    problem = of_singles({"a": 4.0, "b": 1.0, "c": 2.0})
    plan = {"a": "w4", "b": "w4", "c": "w8"}
    fixed = corrected(problem, [tried(problem, plan, 6.5)])
    assert value_of(fixed, "error", plan) == pytest.approx(6.5, rel=0.01)
    # More of the correction goes where more noise is, and a little to all alike.
    assert fixed.error["a", "w4"] / 4.0 > fixed.error["b", "w4"] / 1.0 > 1.0
    assert fixed.error["c", "w4"] > 2.0


def test_two_plans_that_differ_in_one_choice_tell_what_it_costs():
    problem = of_singles({"a": 1.0, "b": 1.0, "c": 1.0})
    both = {"a": "w4", "b": "w4", "c": "w8"}
    seen = [tried(problem, both, 2.0), tried(problem, {**both, "b": "w8"}, 0.4)]
    fixed = corrected(problem, seen)
    assert fixed.error["a", "w4"] < 0.6
    assert fixed.error["b", "w4"] > 1.2


def test_a_plan_without_any_error_teaches_nothing():
    problem = of_singles({"a": 4.0, "b": 1.0})
    floats = {"a": "w8", "b": "w8"}
    assert corrected(problem, [tried(problem, floats, 0.0)]).error == problem.error


def test_it_ends_when_the_table_says_that_nothing_faster_is_left():
    problem = of_singles({"a": 1.0, "b": 1.0}, objective=("bits", "error"), error=3.0)
    found = search_all(problem, lambda plan: 0.5)
    assert len(found) == 1  # both in four bits: no other plan is as small


def test_it_ends_when_every_plan_is_known_and_when_time_is_over():
    problem = of_singles({"a": 1.0, "b": 2.0})
    assert len(search_all(problem, lambda plan: 9.0)) == 4
    late = refined(problem, cp_sat.solve, lambda plan: 9.0, [], rounds=8, is_past=lambda: True)
    assert late == ()


def test_a_solver_that_ignores_what_is_excluded_ends_it():
    problem = of_singles({"a": 1.0, "b": 2.0})
    always = cp_sat.solve(problem)
    found = refined(problem, lambda asked: always, lambda plan: 1.0, [Tried(always, 1.0)], rounds=8)
    assert len(found) == 1


def test_each_other_table_has_its_best_plan_measured_once():
    """The first says that a is harmless, the second that b is, and c is true: of both together."""
    problem = of_singles({"a": 1.0, "b": 9.0}, bits=12.0)
    others = [of_singles({"a": 9.0, "b": 1.0}), of_singles({"a": 9.0, "b": 2.0})]
    first = cp_sat.solve(problem)
    assert first.assignment == {"a": "w4", "b": "w8"}
    start = [Tried(first, 5.0)]
    found = suggested(problem, others, cp_sat.solve, lambda plan: 4.0, start)
    plans = [each.solution.assignment for each in found]
    assert plans[1] == {"a": "w8", "b": "w4"}
    assert len(plans) == 3  # the third is what the second table has for best of those not measured
    assert all(is_feasible(problem, plan) for plan in plans)
    assert best_of(problem, found).error == 4.0
    late = suggested(problem, others, cp_sat.solve, lambda plan: 4.0, start, is_past=lambda: True)
    assert late == (*start,)


def test_another_table_is_scaled_to_what_was_measured():
    """Its sums are a hundredth, yet it may not spend a hundred times the error budget."""
    problem = of_singles({"a": 1.0, "b": 2.0, "c": 4.0}, objective=("bits", "error"), error=3.0)
    other = of_singles({"a": 0.01, "b": 0.04, "c": 0.02})
    start = [tried(problem, {"a": "w4", "b": "w8", "c": "w8"}, 1.0)]
    _, found = suggested(problem, [other], cp_sat.solve, lambda plan: 3.0, start)
    assert found.solution.assignment == {"a": "w4", "b": "w8", "c": "w4"}  # 0.03 = 3 hundredths


def test_a_table_of_which_no_plan_is_left_ends_nothing():
    problem = of_singles({"a": 1.0})
    every = [tried(problem, {"a": o}, 1.0) for o in ("w8", "w4")]
    assert suggested(problem, [problem], cp_sat.solve, lambda plan: 1.0, every) == (*every,)


def of_singles(noise, objective=("error",), **budgets) -> Problem:
    options = dict.fromkeys(noise, ("w8", "w4"))
    error = {(u, o): noise[u] * (o == "w4") for u in noise for o in options[u]}
    bits = {(u, o): 8.0 if o == "w8" else 4.0 for u in noise for o in options[u]}
    return Problem(options, error, objective, resources={"bits": bits}, budgets=budgets)


def tried(problem: Problem, plan: Mapping[str, str], error: float) -> Tried:
    values = {"error": value_of(problem, "error", plan)}
    return Tried(Solution(plan, values, "FEASIBLE", ("error",), {"error": 0.0}, 0.0), error)


def search_all(problem, measure) -> tuple[Tried, ...]:
    first = cp_sat.solve(problem)
    return refined(
        problem, cp_sat.solve, measure, [Tried(first, measure(first.assignment))], rounds=16
    )
