"""The default search: a solver's plans, the error budget rescaled until the measured one fits."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq_fx.errors import InfeasibleError
from mpq_fx.passes.allocate import SEARCHES, Problem, Solution, cp_sat
from mpq_fx.passes.allocate.rescaled import ROUNDS, bisect
from mpq_fx.passes.allocate.search import remembered
from tests.evaluators import evaluator_of

STEPS = 200


def solved(level: int) -> Solution:
    values = {"latency": float(STEPS - level), "error": float(level)}
    objective = ("latency", "error")
    return Solution({"a": str(level)}, values, "OPTIMAL", objective, dict(values), 0.0)


class World:
    """Level k costs STEPS - k ms and (k / STEPS)² of predicted noise; `true` is its real error."""

    def __init__(self, true, least: int = 0) -> None:
        self.true, self.least, self.asked = true, least, []

    def solve(self, budget: float) -> Solution:
        level = int(min(STEPS, budget**0.5 * STEPS + 1e-9))
        if level < self.least:
            raise InfeasibleError("budgets forbid it")
        return solved(level)

    def measure(self, assignment) -> float:
        self.asked.append(int(assignment["a"]))
        return self.true(self.asked[-1] / STEPS)

    def bisect(self, tolerance: float, **options):
        measure = remembered(self.measure)
        return bisect(
            self.solve,
            lambda solution: measure(solution.assignment),
            tolerance,
            start=tolerance,
            **options,
        )


@given(st.floats(0.2, 5.0), st.floats(0.02, 0.5))
def test_the_plan_meets_the_tolerance_and_nearly_uses_it(factor, tolerance):
    """Whatever constant factor the prediction is wrong by."""
    world = World(lambda error: factor * error)
    found = world.bisect(tolerance)
    assert found.error <= tolerance
    ideal = min(tolerance / factor, 1.0)
    assert int(found.solution.assignment["a"]) / STEPS >= 0.75 * ideal - 2 / STEPS
    assert len(world.asked) <= ROUNDS


def test_no_assignment_is_measured_twice():
    world = World(lambda error: 3 * error)
    world.bisect(0.1)
    assert len(world.asked) == len(set(world.asked))


def test_among_those_that_fit_the_best_objective_wins_not_the_last():
    found = World(lambda error: 0.0 if error < 0.3 else 1.0).bisect(0.1)
    assert found.error == 0.0
    assert found.solution.assignment["a"] in {str(k) for k in range(30, 60)}


def test_when_only_float_is_exact_enough_float_is_the_plan():
    found = World(lambda error: 0.0 if error == 0 else 9.0).bisect(0.1)
    assert found.solution.assignment == {"a": "0"}


def test_nothing_is_found_when_even_the_exact_plan_misses():
    assert World(lambda error: 9.0).bisect(0.1) is None


def test_budgets_that_forbid_a_smaller_error_end_in_their_own_words():
    with pytest.raises(InfeasibleError, match="budgets forbid it"):
        World(lambda error: 9.0, least=20).bisect(0.1)


def test_out_of_time_the_first_round_counts():
    world = World(lambda error: 0.5 * error)
    found = world.bisect(0.1, is_past=lambda: True)
    assert len(world.asked) == 1
    assert found.scale == 1.0


def test_out_of_time_without_a_plan_that_fits_it_looks_on():
    """A retry with a tighter tolerance used to end in float, however near a plan was."""
    world = World(lambda error: 3 * error)
    found = world.bisect(0.1, is_past=lambda: True)
    assert found.scale > 0
    assert 0 < found.error <= 0.1


def test_a_drop_of_nothing_is_met_by_what_drops_nothing():
    world = World(lambda error: 0.0 if error < 0.2 else 1.0)
    found = bisect(world.solve, lambda s: world.measure(s.assignment), 0.0, start=0.5)
    assert found.error == 0.0
    assert 20 <= int(found.solution.assignment["a"]) < 40


def choice(limit: float, **options):
    """One unit: int8 has noise 0.04 and half the latency."""
    problem = Problem(
        options={"a": ("float32", "int8")},
        error={("a", "float32"): 0.0, ("a", "int8"): 0.04},
        resources={"latency": {("a", "float32"): 2.0, ("a", "int8"): 1.0}},
        objective=("latency", "error"),
    )
    evaluator = evaluator_of(lambda plan: 0.2 if plan["a"] == "int8" else 0.0, limit, **options)
    return SEARCHES["solver"].run(problem, evaluator)


def test_the_limit_decides_and_without_one_the_objective_alone():
    assert choice(0.1).solution.assignment == {"a": "float32"}
    assert choice(0.3).solution.assignment == {"a": "int8"}
    assert choice(math.inf).solution.assignment == {"a": "int8"}


def test_a_limit_that_no_predicted_error_stands_for_is_met_by_the_exact_plan():
    assert choice(0.3, yardstick=0.0).solution.assignment == {"a": "float32"}


def test_around_the_solvers_plan_others_are_measured_unless_a_metric_is_asked():
    """Only asking tells that the second best of the table is none better."""
    asked: list[str] = []

    def error(plan) -> float:
        asked.append(plan["a"])
        return {"float32": 0.0, "bfloat16": 0.02, "int8": 0.03}[plan["a"]]

    problem = Problem(
        options={"a": ("float32", "bfloat16", "int8")},
        error={("a", "float32"): 0.0, ("a", "bfloat16"): 0.001, ("a", "int8"): 0.002},
        resources={"size": {("a", "float32"): 4.0, ("a", "bfloat16"): 2.0, ("a", "int8"): 2.0}},
        objective=("error", "size"),
        budgets={"size": 2.0},
    )
    for exponent, measured in ((2, ["bfloat16", "int8"]), (1, ["bfloat16"])):
        asked.clear()
        evaluator = evaluator_of(error, 0.05, exponent=exponent)
        found = SEARCHES["solver"].run(problem, evaluator)
        assert found.solution.assignment == {"a": "bfloat16"}
        assert asked == measured


def test_a_plan_that_another_table_has_for_best_wins_where_it_measures_better():
    """With a solver that refuses every further round, only the plans of the tables are measured."""
    options = {"a": ("w8", "w4"), "b": ("w8", "w4")}
    size = {(u, o): 8.0 if o == "w8" else 4.0 for u in options for o in options[u]}

    def problem(a: float, b: float) -> Problem:
        error = {("a", "w8"): 0.0, ("a", "w4"): a, ("b", "w8"): 0.0, ("b", "w4"): b}
        objective = ("error", "size")
        return Problem(options, error, objective, resources={"size": size}, budgets={"size": 12.0})

    def solve(asked: Problem, **given) -> Solution:
        if len(asked.excluded) > 1:
            raise InfeasibleError("enough")
        return cp_sat.solve(asked)

    def found(*others: Problem):
        evaluator = evaluator_of(
            lambda plan: 0.1 if plan["b"] == "w4" else 0.2, 0.5, solve=solve, others=others
        )
        return SEARCHES["solver"].run(problem(0.01, 0.02), evaluator)

    assert found(problem(0.03, 0.01)).solution.assignment == {"a": "w8", "b": "w4"}
    assert found(problem(0.03, 0.01)).error == 0.1
