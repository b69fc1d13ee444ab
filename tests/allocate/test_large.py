"""Thousands of units: the proved gap, the time, and the limits of the heuristics."""

from __future__ import annotations

import itertools
import random
import time
from dataclasses import replace

import pytest

from mpq_fx.errors import ConfigError
from mpq_fx.passes.allocate import (
    SOLVERS,
    Problem,
    brute_force,
    cp_sat,
    frontier,
    is_feasible,
    lagrangian,
    value_of,
)
from mpq_fx.passes.allocate.exact import form_of
from mpq_fx.passes.allocate.joined import joined


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


@pytest.mark.parametrize("solve", [cp_sat.solve, lagrangian.solve])
def test_sparse_pairs_of_five_hundred_units_end_under_one_percent_of_gap(solve):
    problem = with_sparse_pairs(large(500, 8), 5000)
    found = solve(problem, time_limit=5.0)
    assert is_feasible(problem, found.assignment)
    assert 0.0 <= found.gap < 0.01
    assert found.bound <= found.values["error"]


def with_sparse_pairs(problem: Problem, count: int) -> Problem:
    """Single terms of random pairs, at most 0.3 of the geometric mean of both errors, doubled."""
    rng, units, pairs = random.Random(0), list(problem.options), {}
    while len(pairs) < count:
        u, v = rng.sample(units, 2)
        o, p = (rng.choice(problem.options[unit]) for unit in (u, v))
        both = problem.error[u, o] * problem.error[v, p]
        pairs[u, o, v, p] = 2 * rng.uniform(0.0, 0.3) * both**0.5
    return replace(problem, pairs=pairs)


@pytest.mark.parametrize("step", [1, 30])
def test_pairs_under_an_error_budget_get_a_plan(step):
    """Single terms alone say nothing of what fits: dense pairs are most of the error."""
    rng, base = random.Random(0), large(85, 3)
    pairs = {
        (u, o, v, p): 2 * rng.uniform(-0.1, 0.2) * (base.error[u, o] * base.error[v, p]) ** 0.5
        for u, v in itertools.islice(itertools.combinations(base.options, 2), 0, None, step)
        for o in base.options[u]
        for p in base.options[v]
    }
    free = {"size": base.budgets["size"]}
    exact = {unit: offers[-1] for unit, offers in base.options.items()}
    budgets = {"error": 2 * value_of(replace(base, pairs=pairs), "error", exact), **free}
    problem = replace(base, pairs=pairs, budgets=budgets, objective=("latency",))
    found = cp_sat.solve(problem, time_limit=1.0)
    assert is_feasible(problem, found.assignment)
    assert found.bound <= found.values["latency"]


@pytest.mark.parametrize("linked", [False, True])
def test_reading_a_problem_takes_time_in_proportion_to_its_size(linked):
    def seconds(units: int) -> float:
        problem = large(units, 2)
        names = list(problem.options)
        if linked:
            pairs = tuple(zip(names[::2], names[1::2], strict=True))
            problem = replace(problem, links=pairs)
        begin = time.process_time()
        joined(form_of(problem))
        return time.process_time() - begin

    small, eightfold = (min(seconds(units) for _ in range(3)) for units in (500, 4000))
    assert eightfold < 25 * small, "the square would be 64"


def test_brute_force_refuses_size():
    with pytest.raises(ConfigError, match="assignments"):
        brute_force.solve(large(30, 2))


@pytest.mark.parametrize("name", SOLVERS)
def test_errors_below_the_normal_floats_are_errors_too(name):
    problem = large(4, 3, seed=1)
    tiny = {key: value * 1e-307 for key, value in problem.error.items()}
    found = SOLVERS[name](replace(problem, error=tiny))
    best = brute_force.solve(replace(problem, error=tiny))
    assert found.bound <= best.values["error"] <= found.values["error"]
    assert found.values["error"] <= 1.01 * best.values["error"]


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_takes_the_same_arguments(name):
    problem = large(4, 3, seed=1)
    best = brute_force.solve(problem)
    found = SOLVERS[name](problem, time_limit=1.0, hint=best.assignment)
    assert found.values["error"] == pytest.approx(best.values["error"], rel=1e-9)


@pytest.mark.parametrize("coupled", [False, True], ids=["alone", "pairs"])
@pytest.mark.parametrize("each", [1.0, 0.1, 1e-9, 3e7])
def test_the_relaxation_spends_a_budget_to_the_last_of_it(each, coupled):
    """Thirteen of forty equal units fit exactly; one fewer used to be all that floats allowed."""
    units = [f"u{k}" for k in range(40)]
    sizes = {(u, o): each * (1 + (o == "large")) for u in units for o in ("small", "large")}
    problem = Problem(
        options=dict.fromkeys(units, ("small", "large")),
        error={(u, o): float(o == "small") for u in units for o in ("small", "large")},
        pairs={("u0", "large", "u1", "large"): 1e-3} if coupled else {},
        resources={"size": sizes},
        budgets={"size": each * 53},
        objective=("error",),
    )
    found = lagrangian.solve(problem)
    assert is_feasible(problem, found.assignment)
    assert [*found.assignment.values()].count("large") == 13


@pytest.mark.parametrize("solve", [cp_sat.solve, lagrangian.solve])
def test_a_time_limit_of_nothing_is_refused(solve):
    with pytest.raises(ConfigError, match="time_limit"):
        solve(large(2, 2), time_limit=0.0)


def test_a_frontier_without_time_to_search_has_a_plan():
    """Few plans go to CP-SAT alone, which with pairs may have found none in a share of a second."""
    source = random.Random(0)
    units, options = [f"u{k}" for k in range(5)], ("a", "b", "c", "d", "e")
    keys = [(u, o) for u in units for o in options]
    problem = Problem(
        options=dict.fromkeys(units, options),
        error={key: source.random() for key in keys},
        pairs={
            (*one, *two): source.uniform(-1, 1)
            for one, two in itertools.combinations(keys, 2)
            if one[0] != two[0]
        },
        resources={"size": {(u, o): 5.0 - options.index(o) for u, o in keys}},
        objective=("error",),
    )
    found = frontier(problem, "size", points=3, time_limit=1e-3)
    assert found
    assert all(is_feasible(problem, solution.assignment) for solution in found)
