"""A few thousand plans with dense pairs: CP-SAT alone is short of time, so others help it."""

from __future__ import annotations

import itertools
import random

import pytest

from mpq_fx.errors import InfeasibleError
from mpq_fx.passes.allocate import (
    Problem,
    brute_force,
    cp_sat,
    diagnose,
    frontier,
    is_feasible,
    lagrangian,
    value_of,
)


def crowded(seed: int = 0, **given) -> Problem:
    """Three units of 18 options, each pair of which has a term: CP-SAT alone is short of time."""
    source = random.Random(seed)
    units, options = ("a", "b", "c"), tuple(f"o{k}" for k in range(18))
    noise = {
        u: [0.0, *(source.uniform(0.5, 1.5) * 4.0**-k for k in range(17, 0, -1))] for u in units
    }
    error = {(u, o): noise[u][k] for u in units for k, o in enumerate(options)}
    bits = {(u, o): (32.0 - k) / 3 for u in units for k, o in enumerate(options)}
    pairs = {
        (*one, *two): source.uniform(-0.2, 0.2) * (error[one] * error[two]) ** 0.5
        for one, two in itertools.combinations(error, 2)
        if one[0] != two[0] and error[one] * error[two] > 0
    }
    return Problem(
        options=dict.fromkeys(units, options),
        error=error,
        pairs=pairs,
        resources={"bits": bits},
        **given,
    )


@pytest.mark.parametrize("budgets", [{"error": 0.01}, {"bits": 50.0, "error": 0.01}], ids=str)
def test_a_floor_that_not_even_float_reaches_names_what_it_reaches(budgets):
    """CP-SAT finds no plan in its share of the time here, so searches begin with the float one."""
    problem = crowded(budgets=budgets, floors={"bits": 33.0}, objective=("error",))
    found = diagnose(problem, time_limit=1.0)
    assert found.conflict == ("-bits",)
    assert found.reachable == {**budgets, "-bits": -32.0}
    with pytest.raises(InfeasibleError) as caught:
        cp_sat.solve(problem, time_limit=1.0)
    assert caught.value.fix == 'options={"min_bits": 32}'


def test_the_lagrangian_solver_looks_for_a_plan_where_cp_sat_would():
    """Few plans with pairs go to CP-SAT alone; this solver has nothing behind its start."""
    problem = crowded(budgets={"error": 0.01}, objective=("bits",))
    unchanged = dict.fromkeys(problem.options, "o0")
    found = lagrangian.solve(problem, hint=unchanged)
    best = cp_sat.solve(problem)
    assert is_feasible(problem, found.assignment)
    cost = [
        value_of(problem, "bits", plan) for plan in (unchanged, found.assignment, best.assignment)
    ]
    assert cost[2] <= cost[1] <= cost[2] + (cost[0] - cost[2]) / 4


def test_few_plans_are_relaxed_where_cp_sat_runs_out_of_time():
    """It ends without a plan of its own here; what a caller has in hand is no answer."""
    problem = crowded(budgets={"error": 0.01}, objective=("bits",))
    unchanged = dict.fromkeys(problem.options, "o0")
    hurried = cp_sat.solve(problem, time_limit=0.3, hint=unchanged)
    assert hurried.status != "OPTIMAL"
    best = brute_force.solve(problem)
    values = [
        value_of(problem, "bits", plan) for plan in (unchanged, hurried.assignment, best.assignment)
    ]
    assert values[2] <= values[1] <= values[2] + (values[0] - values[2]) / 4
    assert hurried.bound <= values[2]


def test_a_frontier_of_few_plans_has_more_than_its_ends():
    problem = crowded(budgets={"error": 0.01}, objective=("bits",))
    assert len(frontier(problem, "bits", 6, time_limit=2.0)) >= 4
