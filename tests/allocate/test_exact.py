"""cp_sat = brute force, on random small problems: values, feasibility, reasons, frontiers."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mpq_fx.errors import InfeasibleError
from mpq_fx.passes.allocate import (
    Problem,
    Solution,
    brute_force,
    cp_sat,
    diagnose,
    explain,
    frontier,
    is_feasible,
    minimize,
    value_of,
    values_of,
)
from mpq_fx.passes.allocate.exact import form_of
from mpq_fx.passes.allocate.messages import relax_pairs
from mpq_fx.passes.allocate.minimize import Search, start
from mpq_fx.passes.allocate.model import Clock
from mpq_fx.passes.allocate.problem import limits_of, within
from tests.allocate.random_problems import problems, rich


def wild(seed: int) -> Problem:
    """Values over 12 decades, so that one scale for a whole table would lose most of them."""
    rng = random.Random(seed)
    options = {f"u{i}": ("w8", "w4", "w2")[: rng.randint(2, 3)] for i in range(5)}
    keys = [(u, o) for u, offers in options.items() for o in offers]
    error = {key: rng.choice((1, 1, 1, -1)) * 10 ** rng.uniform(-12, 0) for key in keys}
    latency = {key: 10 ** rng.uniform(-9, 3) for key in keys}
    pairs = {}
    for (u, o), (v, p) in zip(keys, rng.sample(keys, len(keys)), strict=True):
        if u != v and seed % 2:
            pairs[u, o, v, p] = rng.choice((1, -1)) * 10 ** rng.uniform(-12, 0)
    plan = {u: rng.choice(offers) for u, offers in options.items()}
    budget = sum(latency[u, o] for u, o in plan.items())
    return Problem(
        options=options,
        error=error,
        objective=("error",),
        pairs=pairs,
        resources={"latency": latency},
        budgets={"latency": budget},
    )


def solved(solver: Any, problem: Problem) -> Solution | None:
    try:
        return solver.solve(problem)
    except InfeasibleError:
        return None


def limited(problem: Problem, limits: dict[str, float]) -> Problem:
    """Under these limits alone: of "-q" as a floor of q."""
    return replace(
        problem,
        budgets={n: at for n, at in limits.items() if not n.startswith("-")},
        floors={n.removeprefix("-"): -at for n, at in limits.items() if n.startswith("-")},
    )


def least(problem: Problem, name: str, limits: dict[str, float]) -> float:
    """The smallest value of a quantity under some limits, of all plans; inf if there is none."""
    choices = itertools.product(*problem.options.values())
    plans = (dict(zip(problem.options, choice, strict=True)) for choice in choices)
    under = limited(problem, limits)
    return min(
        (value_of(problem, name, plan) for plan in plans if is_feasible(under, plan)),
        default=math.inf,
    )


RICH = [rich(seed, coupled=seed % 2 == 0) for seed in range(50)]


def on_rich_problems(test: Any) -> Any:
    """Random problems of hypothesis, and some that hold every kind of limit."""
    for problem in RICH:
        test = example(problem)(test)
    return test


@settings(max_examples=350)
@given(problems())
@on_rich_problems
def test_equals_brute_force_in_every_objective_and_in_feasibility(problem):
    want, got = solved(brute_force, problem), solved(cp_sat, problem)
    assert (want is None) == (got is None)
    if want is None or got is None:
        return
    assert is_feasible(problem, got.assignment)
    assert got.status == "OPTIMAL"
    assert got.values == values_of(problem, got.assignment)
    for name in problem.objective:
        assert got.values[name] == pytest.approx(want.values[name], rel=3e-9, abs=1e-12)
    assert within(got.bound, want.values[problem.objective[0]])


@settings(max_examples=150)
@given(problems(), st.integers(1, 4))
def test_excluding_the_answers_so_far_gives_the_next_best(problem, count):
    for _ in range(count):
        want, got = solved(brute_force, problem), solved(cp_sat, problem)
        assert (want is None) == (got is None)
        if want is None or got is None:
            return
        assert is_feasible(problem, got.assignment)
        for name in problem.objective:
            assert got.values[name] == pytest.approx(want.values[name], rel=3e-9, abs=1e-12)
        assert within(got.bound, want.values[problem.objective[0]])
        problem = replace(problem, excluded=(*problem.excluded, got.assignment))


def test_an_excluded_plan_whose_tied_units_differ_excludes_no_other():
    options = dict.fromkeys("abc", ("w8", "w4"))
    table = {(u, o): float(o == "w8") for u in options for o in options[u]}
    pairs = {("a", "w4", "c", "w4"): -1.0}  # without a pair no CP-SAT would be asked
    excluded = ({"a": "w4", "b": "w8", "c": "w4"},)
    problem = Problem(
        options, table, ("error",), pairs=pairs, ties=(("a", "b"),), excluded=excluded
    )
    assert cp_sat.solve(problem).assignment == dict.fromkeys("abc", "w4")


def test_with_every_plan_excluded_the_error_says_so():
    options, table = {"a": ("w8", "w4")}, {("a", "w8"): 1.0, ("a", "w4"): 2.0}
    problem = Problem(options, table, ("error",), excluded=({"a": "w8"}, {"a": "w4"}))
    with pytest.raises(InfeasibleError, match="no plan meets the budgets but 2 that are excluded"):
        cp_sat.solve(problem)


@settings(max_examples=100)
@given(problems())
@on_rich_problems
def test_infeasible_names_a_minimal_conflict_and_what_is_reachable(problem):
    if solved(brute_force, problem) is not None:
        return
    limits, found = limits_of(problem), diagnose(problem)
    conflict = {n: limits[n] for n in found.conflict}
    assert solved(brute_force, limited(problem, conflict)) is None
    for name in conflict:
        fewer = {n: at for n, at in conflict.items() if n != name}
        assert solved(brute_force, limited(problem, fewer)) is not None
    for name in limits:
        others = {n: at for n, at in limits.items() if n != name}
        assert found.alone[name] == pytest.approx(least(problem, name, {}), rel=3e-9, abs=1e-12)
        assert found.kept[name] == pytest.approx(least(problem, name, others), rel=3e-9, abs=1e-12)
    reachable = {n: at if n.startswith("-") else max(at, 0.0) for n, at in found.reachable.items()}
    assert solved(brute_force, limited(problem, reachable)) is not None


@pytest.mark.parametrize("seed", range(60))
def test_twelve_decades_of_spread_cost_neither_feasibility_nor_the_optimum(seed):
    problem = wild(seed)
    want, got = brute_force.solve(problem), cp_sat.solve(problem)
    assert is_feasible(problem, got.assignment)
    assert got.values["error"] == pytest.approx(want.values["error"], rel=1e-9, abs=0.0)
    assert got.bound <= want.values["error"]


@settings(max_examples=250)
@given(problems())
@on_rich_problems
def test_the_start_is_feasible_its_bound_holds_and_keeps_an_optimal_plan(problem):
    name = problem.objective[0]
    want = solved(brute_force, replace(problem, objective=(name,)))
    if want is None:
        return
    search = Search(problem, form_of(problem), name, limits_of(problem), Clock(10.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minimize, "FEW", 0)
        left, level = start(search, None)
    assert within(level.bound, want.values[name])
    assert level.assignment is None or is_feasible(problem, level.assignment)
    sizes = [range(len(group.options)) for group in left.form.groups]
    plans = (left.form.assignment(picks) for picks in itertools.product(*sizes))
    costs = [value_of(problem, name, plan) for plan in plans if is_feasible(problem, plan)]
    least = min([*costs, math.inf if level.assignment is None else level.value])
    assert least == pytest.approx(want.values[name], rel=3e-9, abs=1e-12)


@settings(max_examples=100)
@given(problems())
@on_rich_problems
def test_no_plan_with_an_option_costs_less_than_the_bound_and_what_the_option_adds(problem):
    form, name = form_of(problem), problem.objective[0]
    found = relax_pairs(form, name, limits_of(problem)) if form.is_coupled else None
    if found is None:
        return
    plans = itertools.product(*(range(len(group.options)) for group in form.groups))
    for picks in plans:
        plan = form.assignment(picks)
        if is_feasible(problem, plan):
            most = found.bound + max(found.extra[g, i] for g, i in enumerate(picks))
            cost = value_of(problem, name, plan)
            assert most <= cost + 1e-9 * max(abs(cost), abs(most), 1.0)


@settings(max_examples=60)
@given(st.integers(2, 12), st.randoms(use_true_random=False))
def test_without_budgets_messages_are_exact_on_a_tree(units, rng):
    """The plan of the single terms alone is another one; on a tree the bound is the optimum."""
    names = [f"u{k}" for k in range(units)]
    options = dict.fromkeys(names, ("a", "b", "c"))
    error = {(u, o): rng.uniform(0, 1) for u in names for o in "abc"}
    parents, pairs = {}, {}
    for k in range(1, units):
        parents[k] = names[rng.randrange(k)]
        pairs |= {(parents[k], o, names[k], p): rng.uniform(-1, 1) for o in "abc" for p in "abc"}
    problem = Problem(options=options, error=error, objective=("error",), pairs=pairs)
    want = lowest_of_tree(names, parents, error, pairs)
    found = relax_pairs(form_of(problem), "error", {})
    assert found is not None
    assert found.bound == pytest.approx(want, rel=1e-6, abs=1e-9)
    assert found.bound <= want + 1e-12


def lowest_of_tree(names: Any, parents: Any, error: Any, pairs: Any) -> float:
    """By dynamic programming, from the last unit to the first."""
    cost = dict(error)
    for k in range(len(names) - 1, 0, -1):
        u, v = parents[k], names[k]
        for o in "abc":
            cost[u, o] += min(pairs[u, o, v, p] + cost[v, p] for p in "abc")
    return min(cost[names[0], o] for o in "abc")


@settings(max_examples=25)
@given(problems(), st.sampled_from(("latency", "size")))
def test_every_frontier_point_is_non_dominated(problem, resource):
    problem = replace(problem, budgets={}, floors={})
    choices = itertools.product(*problem.options.values())
    plans = [dict(zip(problem.options, choice, strict=True)) for choice in choices]
    every = [values_of(problem, plan) for plan in plans if is_feasible(problem, plan)]
    found = frontier(problem, resource, points=5)
    spots = [(s.values[resource], s.values["error"]) for s in found]
    assert spots == sorted(spots)
    assert 1 <= len(spots) <= 5
    assert spots[0][0] == pytest.approx(min(v[resource] for v in every), abs=1e-9)
    assert spots[-1][1] == pytest.approx(min(v["error"] for v in every), abs=1e-9)
    for use, error in spots:
        assert not any(
            (v[resource] < use - 1e-6 and v["error"] <= error + 1e-9)
            or (v["error"] < error - 1e-6 and v[resource] <= use + 1e-9)
            for v in every
        )


def test_a_frontier_has_both_ends_however_short_the_time():
    """With pairs CP-SAT alone finds no plan in a share of a second: tuning used to end there."""
    source = random.Random(0)
    options = tuple(f"o{k}" for k in range(9))
    singles = {(u, o): source.uniform(0, 1) for u in "abcd" for o in options}
    pairs = {
        (u, o, v, p): source.gauss(0, 0.1)
        for u, v in itertools.combinations("abcd", 2)
        for o in options
        for p in options
    }
    problem = Problem(
        options=dict.fromkeys("abcd", options),
        error=singles,
        pairs=pairs,
        resources={"size": {key: source.uniform(1, 9) for key in singles}},
        objective=("size", "error"),
    )
    found = frontier(problem, "size", points=7, time_limit=1.0)
    assert len(found) > 1
    assert found[0].values["error"] > found[-1].values["error"]


def test_frontier_with_enough_points_is_the_whole_pareto_set():
    weights = {"a": 1.0, "b": 2.0, "c": 4.0}
    options = dict.fromkeys(weights, ("w8", "w4"))
    size = {(u, o): w * (2.0 if o == "w8" else 1.0) for u, w in weights.items() for o in options[u]}
    error = {
        (u, o): w * (0.0 if o == "w8" else 1.0) for u, w in weights.items() for o in options[u]
    }
    problem = Problem(options, error, ("error",), resources={"size": size}, budgets={"size": 9.0})
    found = frontier(problem, "size", points=20)
    assert [s.values["size"] for s in found] == [7.0 + n for n in range(8)]
    assert [s.values["error"] for s in found] == [7.0 - n for n in range(8)]


def test_a_frontier_keeps_floors_but_those_of_its_own_ends():
    options = dict.fromkeys("ab", ("w8", "w4"))
    keys = [(u, o) for u in options for o in options[u]]
    table = {key: float(key[1][1:]) for key in keys}
    error = {key: 8.0 - width for key, width in table.items()}
    problem = Problem(options, error, ("error",), resources={"size": table, "bits": table})
    lifted = frontier(replace(problem, floors={"size": 14.0, "error": 1.0}), "size")
    assert [s.values["size"] for s in lifted] == [8.0, 12.0, 16.0]
    kept = frontier(replace(problem, floors={"bits": 12.0}), "size")
    assert [s.values["size"] for s in kept] == [12.0, 16.0]


def test_the_same_problem_gives_the_same_answer():
    for problem in (rich(0), rich(4), rich(1, coupled=False)):
        first, second = (solved(cp_sat, problem) for _ in range(2))
        assert first is None or replace(first, seconds=0.0) == replace(second, seconds=0.0)
    for seed in range(5):
        first, second = cp_sat.solve(wild(seed)), cp_sat.solve(wild(seed))
        assert replace(first, seconds=0.0) == replace(second, seconds=0.0)


PAIR = Problem(
    options={"a": ("w8", "w4"), "b": ("w8", "w4")},
    error={("a", "w8"): 0.0, ("a", "w4"): 0.01, ("b", "w8"): 0.0, ("b", "w4"): 0.03},
    objective=("latency",),
    resources={
        "latency": {("a", "w8"): 2.0, ("a", "w4"): 1.0, ("b", "w8"): 2.0, ("b", "w4"): 1.0},
        "size": {("a", "w8"): 8.0, ("a", "w4"): 4.0, ("b", "w8"): 8.0, ("b", "w4"): 4.0},
    },
)


def test_message_names_both_budgets_and_a_line_to_type():
    error = explain(replace(PAIR, budgets={"error": 0.01, "latency": 2.5, "size": 100.0}))
    assert str(error) == (
        "no plan meets error <= 0.01 and latency <= 2.5 together\n"
        "    error: budget 0.01, smallest reachable 0, 0.04 with the other budgets kept\n"
        "    latency: budget 2.5, smallest reachable 2, 3 with the other budgets kept\n"
        "    size: budget 100, smallest reachable 8\n"
        '  fix  options={"tolerance": 0.2}  or  options={"max_latency": 3}'
    )


def test_two_conflicts_at_once_are_fixed_in_one_line():
    error = explain(replace(PAIR, budgets={"latency": 1.0, "size": 1.0}))
    assert error.fix == 'options={"max_latency": 2, "max_size": 8}'


def test_a_budget_raised_to_the_printed_value_is_reachable():
    third = {key: value / 3 for key, value in PAIR.resources["latency"].items()}
    problem = replace(PAIR, resources={"latency": third}, budgets={"latency": 0.1})
    with pytest.raises(InfeasibleError, match=r"0\.666667"):
        cp_sat.solve(problem)
    assert cp_sat.solve(replace(problem, budgets={"latency": 0.666667})).status == "OPTIMAL"


def test_a_negative_pair_makes_the_two_worse_options_the_best():
    cancel = {("a", "w4", "b", "w4"): -0.05}
    found = cp_sat.solve(replace(PAIR, pairs=cancel, objective=("error",)))
    assert found.assignment == {"a": "w4", "b": "w4"}
    assert found.values["error"] == pytest.approx(-0.01)


def test_an_edge_cost_keeps_two_units_in_one_format():
    mixed = {("a", "w8", "b", "w4"): 5.0, ("a", "w4", "b", "w8"): 5.0}
    problem = replace(PAIR, edges={"latency": mixed}, budgets={"error": 0.03})
    assert cp_sat.solve(problem).assignment == {"a": "w8", "b": "w8"}


def test_the_second_objective_breaks_ties_of_the_first():
    level = dict.fromkeys(PAIR.error, 1.0)
    problem = replace(PAIR, resources={"latency": level}, objective=("latency", "error"))
    found = cp_sat.solve(problem)
    assert found.assignment == {"a": "w8", "b": "w8"}
    assert found.bounds == {"latency": 2.0, "error": 0.0}


def test_a_hint_that_names_nothing_known_is_no_obstacle():
    found = cp_sat.solve(PAIR, hint={"a": "w3", "z": "w8"})
    assert found.values["latency"] == 2.0
