"""Thousands of units: the proved gap, the time, and the limits of the heuristics."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from mpq_fx.errors import ConfigError
from mpq_fx.passes.allocate import SOLVERS, Problem, brute_force, cp_sat, is_feasible, lagrangian


def large(units: int, options: int, seed: int = 0) -> Problem:
    """Error falls and cost grows with the option, at rates that differ between units."""
    rng = random.Random(seed)
    names = tuple(f"w{j}" for j in range(options))
    offers = {f"u{i}": names for i in range(units)}
    error, latency, size = {}, {}, {}
    for unit in offers:
        weights, noise = 10 ** rng.uniform(4, 7), 10 ** rng.uniform(-8, -3)
        for j, option in enumerate(names):
            error[unit, option] = noise * 4.0**-j * rng.uniform(0.5, 1.5)
            latency[unit, option] = weights * 1e-6 * (j + 2) * rng.uniform(0.8, 1.2)
            size[unit, option] = float(round(weights * (j + 1)))
    most = {
        n: sum(t[u, names[-1]] for u in offers) for n, t in (("latency", latency), ("size", size))
    }
    return Problem(
        options=offers,
        error=error,
        objective=("error",),
        resources={"latency": latency, "size": size},
        budgets={"latency": 0.52 * most["latency"], "size": 0.5 * most["size"]},
    )


@pytest.mark.timeout(40)
@pytest.mark.parametrize("solve", [cp_sat.solve, lagrangian.solve])
def test_two_thousand_units_end_under_one_percent_of_gap(solve):
    problem = large(2000, 6)
    found = solve(problem, time_limit=5.0)
    assert is_feasible(problem, found.assignment)
    assert 0.0 <= found.gap < 0.01
    assert found.bound <= found.values["error"]


def test_a_search_cut_short_keeps_its_plan_and_its_gap():
    found = cp_sat.solve(large(300, 6), time_limit=0.01)
    assert found.status == "FEASIBLE"
    assert 0.0 < found.gap < 0.01


def test_the_answer_does_not_depend_on_the_clock():
    first, second = (cp_sat.solve(large(300, 6), time_limit=1.0) for _ in range(2))
    assert replace(first, seconds=0.0) == replace(second, seconds=0.0)


def test_pairs_of_forty_units_are_proved_or_bounded():
    problem = large(40, 3)
    units = list(problem.options)
    pairs = {
        (u, "w0", v, "w0"): sign * (problem.error[u, "w0"] * problem.error[v, "w0"]) ** 0.5
        for u, v, sign in zip(units, units[1:], [1, -1] * 20, strict=False)
    }
    alone = cp_sat.solve(problem)
    found = cp_sat.solve(replace(problem, pairs=pairs), time_limit=5.0, hint=alone.assignment)
    assert found.gap < 0.01
    assert is_feasible(problem, found.assignment)


def test_the_lagrangian_refuses_pairs_and_brute_force_refuses_size():
    pairs = {("u0", "w0", "u1", "w1"): 1.0}
    with pytest.raises(ConfigError, match="pair or edge"):
        lagrangian.solve(replace(large(2, 2), pairs=pairs))
    with pytest.raises(ConfigError, match="assignments"):
        brute_force.solve(large(30, 2))


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_takes_the_same_arguments(name):
    problem = large(4, 3, seed=1)
    best = brute_force.solve(problem)
    found = SOLVERS[name](problem, time_limit=1.0, hint=best.assignment)
    assert found.values["error"] == pytest.approx(best.values["error"], rel=1e-9)


@pytest.mark.parametrize("solve", [cp_sat.solve, lagrangian.solve])
def test_a_time_limit_of_nothing_is_refused(solve):
    with pytest.raises(ConfigError, match="time_limit"):
        solve(large(2, 2), time_limit=0.0)
