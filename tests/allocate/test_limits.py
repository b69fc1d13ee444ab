"""Floors, minimum counts, option masks, and peaks of many sums: what they mean, at which size."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from mpq_fx.errors import InfeasibleError
from mpq_fx.passes.allocate import (
    Problem,
    brute_force,
    cp_sat,
    explain,
    is_feasible,
    lagrangian,
    value_of,
)
from mpq_fx.passes.allocate.exact import form_of
from mpq_fx.passes.allocate.minimize import Search, start
from mpq_fx.passes.allocate.model import Clock, Task, run
from mpq_fx.passes.allocate.problem import Condition, Term, count_of, limits_of, values_of
from mpq_fx.passes.allocate.quantity import Quantity, kept
from mpq_fx.passes.allocate.relaxation import TIGHTEST, relax, relaxed_rows, shared_out
from mpq_fx.passes.allocate.rows import rows_of
from tests.allocate.random_problems import rich

BITS = {"w8": 8.0, "w4": 4.0, "w2": 2.0}
OFFERS = dict.fromkeys("abc", tuple(BITS))
KEYS = list(itertools.product(OFFERS, BITS))
MEAN = {(u, o): BITS[o] / len(OFFERS) for u, o in KEYS}
WINDOW = Problem(
    options=OFFERS,
    error={(u, o): 1.0 / BITS[o] for u, o in KEYS},
    objective=("latency", "error"),
    resources={"latency": {(u, o): BITS[o] for u, o in KEYS}, "bits": MEAN},
)


def bits(found) -> list[float]:
    return sorted(BITS[option] for option in found.assignment.values())


def test_a_window_of_mean_bits_is_kept_from_both_sides():
    assert bits(cp_sat.solve(WINDOW)) == [2.0, 2.0, 2.0]
    low = replace(WINDOW, floors={"bits": 4.5})
    assert sum(bits(cp_sat.solve(low))) == 14.0  # 13.5 is between two plans
    both = replace(low, objective=("error",), budgets={"bits": 4.7})
    assert bits(cp_sat.solve(both)) == [2.0, 4.0, 8.0]
    with pytest.raises(InfeasibleError):
        cp_sat.solve(replace(both, budgets={"bits": 4.6}))


def test_a_floor_is_met_whatever_the_order_of_its_sum():
    tenths = dict.fromkeys(KEYS, 0.1)
    resources = {**WINDOW.resources, "tenths": tenths}
    for floor in (0.3, 0.1 + 0.1 + 0.1):
        exact = {"floors": {"tenths": floor}, "budgets": {"tenths": floor}}
        problem = replace(WINDOW, resources=resources, **exact)
        assert cp_sat.solve(problem).status == "OPTIMAL"


def test_a_message_names_floors_and_budgets_apart():
    error = explain(replace(WINDOW, budgets={"latency": 12.0}, floors={"bits": 7.0}))
    assert str(error) == (
        "no plan meets latency <= 12 and bits >= 7 together\n"
        "    latency: budget 12, smallest reachable 6, 24 with the other budgets kept\n"
        "    bits: floor 7, largest reachable 8, 4 with the other budgets kept\n"
        '  fix  options={"max_latency": 24}  or  options={"min_bits": 4}'
    )
    alone = explain(replace(WINDOW, floors={"bits": 9.0}))
    assert str(alone) == (
        "no plan meets bits >= 9\n"
        "    bits: floor 9, largest reachable 8\n"
        '  fix  options={"min_bits": 8}'
    )


# --- minimum counts (card B2: experts of a mixture, at least one at 3 bits and one at 2) --------

PHI, ROUTED = (0.4, 0.3, 0.2, 0.1), (0.45, 0.25, 0.2, 0.1)
EPS = ((8.0, 4.0, 1.0), (8.0, 4.0, 1.0), (10.0, 5.0, 1.0), (20.0, 6.0, 1.0))


def experts(gamma: float, counts: bool) -> Problem:
    options = dict.fromkeys("0123", ("1", "2", "3"))
    error = {
        (str(e), str(b + 1)): PHI[e] * ROUTED[e] ** 1.5 * EPS[e][b] ** gamma
        for e in range(4)
        for b in range(3)
    }
    width = {(u, o): float(o) for u in options for o in options[u]}
    wanted = {n: count_of(options, [Condition(u, (n,)) for u in options]) for n in ("3", "2")}
    named = {f"experts at {n} bits": table for n, table in wanted.items()}
    return Problem(
        options=options,
        error=error,
        objective=("error",),
        resources={"total": width, **named},
        budgets={"total": 8.0},
        floors=dict.fromkeys(named, 1.0) if counts else {},
    )


@pytest.mark.parametrize(
    ("gamma", "counts", "want", "error"),
    [
        (1.0, True, "3221", 0.423436),
        (1.0, False, "3311", 0.400379),
        (2.0, True, "3221", 2.432872),
        (2.0, False, "3221", 2.432872),
    ],
)
def test_minimum_counts_of_experts(gamma, counts, want, error):
    found = cp_sat.solve(experts(gamma, counts))
    assert "".join(found.assignment.values()) == want
    assert found.values["error"] == pytest.approx(error, abs=1e-6)


def test_a_count_that_too_few_units_can_reach_is_named():
    problem = replace(experts(1.0, counts=False), floors={"experts at 3 bits": 3.0})
    assert str(explain(problem)).splitlines()[:3] == [
        "no plan meets total <= 8 and experts at 3 bits >= 3 together",
        "    total: budget 8, smallest reachable 4, 10 with the other budgets kept",
        "    experts at 3 bits: floor 3, largest reachable 4, 2 with the other budgets kept",
    ]


def test_a_count_is_of_the_units_and_options_that_are_named():
    table = count_of(OFFERS, [Condition("a", ("w8", "w4")), Condition("b", ("w2",))])
    assert {key for key, value in table.items() if value} == {("a", "w8"), ("a", "w4"), ("b", "w2")}
    assert table.keys() == set(KEYS)


# --- option masks: what a unit offers, and what is forced --------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_a_mask_is_fewer_options_or_one_that_is_forced(seed):
    """Fewer options, or `forced`, give what forbidding every other plan gives."""
    rng, whole = random.Random(seed), replace(rich(seed), links=(), ties=())
    kept = {}
    for u, offers in whole.options.items():
        kept[u] = tuple(o for o in offers if rng.random() < 0.6) or offers[:1]
    terms = {key: term for key, term in whole.pairs.items() if _is_kept(key, kept)}
    masked = replace(
        whole,
        options=kept,
        error={(u, o): v for (u, o), v in whole.error.items() if o in kept[u]},
        pairs=terms,
        resources={
            name: {(u, o): v for (u, o), v in table.items() if o in kept[u]}
            for name, table in whole.resources.items()
        },
        peaks={"memory": tuple(tuple(_masked(t, kept) for t in s) for s in whole.peaks["memory"])},
        classes={},
    )
    fixed = {u: offers[0] for u, offers in kept.items() if len(offers) == 1}
    for problem, plans in ((masked, kept), (replace(whole, forced=fixed), None)):
        allowed = plans or {**whole.options, **{u: (option,) for u, option in fixed.items()}}
        best = lowest(whole, allowed)
        if best is None:
            with pytest.raises(InfeasibleError):
                cp_sat.solve(problem)
        else:
            found = cp_sat.solve(problem)
            assert all(o in allowed[u] for u, o in found.assignment.items())
            assert found.values[whole.objective[0]] == pytest.approx(best, rel=1e-9)


def _is_kept(key, kept) -> bool:
    u, o, v, p = key
    return o in kept[u] and p in kept[v]


def _masked(term: Term, kept) -> Term:
    when = (Condition(c.unit, tuple(o for o in c.options if o in kept[c.unit])) for c in term.when)
    return replace(term, when=tuple(when))


def lowest(problem: Problem, allowed) -> float | None:
    """The first objective's least over the plans within a mask, one by one."""
    choices = itertools.product(*allowed.values())
    plans = (dict(zip(allowed, picks, strict=True)) for picks in choices)
    good = (values_of(problem, p) for p in plans if is_feasible(problem, p))
    return min((values[problem.objective[0]] for values in good), default=None)


# --- peaks: one row per sum -------------------------------------------------------------------


def layers(count: int, seed: int = 0, *, untied: bool = False) -> Problem:
    """A chain of layers: at each the bytes of two neighbors' inputs are live; some have more."""
    rng = random.Random(seed)
    units = [f"layer{k}" for k in range(count)]
    options = dict.fromkeys(units, ("f32", "bf16", "int8", "int8/dynamic"))
    share = {"f32": 1.0, "bf16": 0.5, "int8": 0.25, "int8/dynamic": 1.0}
    speed = {"f32": 1.0, "bf16": 0.6, "int8": 0.35, "int8/dynamic": 0.3}
    keys = [(u, o) for u in units for o in options[u]]
    held = {unit: float(rng.randint(1, 9) * 4096) for unit in units}
    sums = []
    for first, second in itertools.pairwise(units):
        readers = (first, second) if untied else (first,)
        terms = [Term(held[first] + held[second])]
        for o in ("bf16", "int8"):
            saved = (share[o] - 1.0) * held[first]
            terms.append(Term(saved, tuple(Condition(u, (o,)) for u in readers)))
            terms.append(Term((share[o] - 1.0) * held[second], (Condition(second, (o,)),)))
        sums.append(tuple(terms))
    return Problem(
        options=options,
        error={(u, o): rng.uniform(0.5, 1.5) * (1.0 - share[o]) for u, o in keys},
        objective=("latency", "error"),
        resources={"latency": {(u, o): rng.uniform(0.9, 1.1) * speed[o] for u, o in keys}},
        peaks={"memory": tuple(sums)},
        budgets={"error": 0.55 * count, "memory": 0.7 * max(sum_[0].value for sum_ in sums)},
    )


@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_the_largest_sum_keeps_to_the_budget(seed, untied):
    problem = layers(6, seed, untied=untied)
    want, got = brute_force.solve(problem), cp_sat.solve(problem)
    assert got.values["latency"] == pytest.approx(want.values["latency"], rel=1e-9)
    assert got.values["memory"] <= problem.budgets["memory"]
    free = cp_sat.solve(replace(problem, budgets={"error": 9.0}))
    assert free.values["latency"] <= got.values["latency"]


def test_the_least_peak_there_is():
    problem = replace(layers(6), objective=("memory", "latency"), budgets={"error": 1.0})
    want, got = brute_force.solve(problem), cp_sat.solve(problem)
    assert got.values["memory"] == want.values["memory"] == got.bound
    assert got.values["latency"] == pytest.approx(want.values["latency"], rel=1e-9)


def test_memory_out_of_reach_says_how_little_there_can_be():
    problem = replace(layers(6), budgets={"memory": 1.0})
    least = brute_force.solve(replace(problem, budgets={}, objective=("memory",))).bound
    assert f"smallest reachable {least:g}" in str(explain(problem))


def test_sums_that_are_never_the_largest_take_no_row():
    whole = layers(200)
    (kept,) = [form_of(replace(whole, objective=("memory",))).quantities["memory"]]
    assert len(kept) < len(whole.peaks["memory"])
    lows = [part.least for part in kept]
    assert all(part.most > max(lows) for part in kept)


def test_only_rows_that_can_bind_reach_the_solver():
    problem = layers(60)
    problem = replace(problem, budgets={"error": 33.0, "memory": 1.2 * problem.budgets["memory"]})
    form = form_of(problem)
    parts, limit = form.quantities["memory"], problem.budgets["memory"]
    search = Search(problem, form, "latency", problem.budgets, Clock(10.0))
    tight = start(search, None)[0].form.quantities["memory"]
    assert 0 < len(tight) < len(parts)
    assert all(part.most > limit for part in tight)
    assert len(relaxed_rows(form, "latency", {"memory": problem.budgets["memory"]})[1]) <= TIGHTEST
    slack = {"memory": 2 * 9 * 4096.0}
    assert relaxed_rows(form, "latency", slack)[1] == ()


def test_the_sum_that_is_largest_at_the_least_bounds_a_peak():
    problem = replace(layers(8), objective=("memory",), budgets={})
    form = form_of(problem)
    least = [part.least / 2**part.shift for part in form.quantities["memory"]]
    assert len(set(least)) > 1
    found = relax(form, "memory", {})
    assert found is not None
    assert found.bound == max(least) <= brute_force.solve(problem).values["memory"]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("untied", [False, True])
@pytest.mark.parametrize("solve", [cp_sat.solve, lagrangian.solve])
def test_peaks_of_many_layers_end_under_one_percent_of_gap(solve, untied):
    problem = layers(250, untied=untied)
    hint = dict.fromkeys(problem.options, "bf16")
    found = solve(replace(problem, objective=("latency",)), time_limit=5.0, hint=hint)
    assert is_feasible(problem, found.assignment)
    assert found.bound <= found.values["latency"]
    if solve is cp_sat.solve:
        assert found.gap < 0.01


@pytest.mark.parametrize("seed", range(30))
def test_what_groups_share_of_a_joint_term_is_never_more_than_the_term(seed):
    problem = rich(seed)
    form = form_of(replace(problem, objective=("memory",)))
    parts = form.quantities["memory"]
    for picks in itertools.product(*(range(len(group.options)) for group in form.groups)):
        for part in parts:
            relaxed = shared_out(part)
            assert value(relaxed, picks) <= value(part, picks)
            assert part.least <= value(part, picks) <= part.most
        plan = form.assignment(picks)
        largest = max(value(part, picks) for part in parts) / 2 ** parts[0].shift
        assert largest == value_of(problem, "memory", plan)


def test_joint_terms_that_fewer_options_make_the_same_add_up():
    first, second = ((0, (0, 1)), (1, (0,))), ((0, (0,)), (1, (0,)))
    whole = Quantity(((0, 0), (0, 0)), {}, 0, joint={first: 5, second: 7})
    assert kept(whole, [[0], [0, 1]]).joint == {second: 12}
    assert kept(whole, [[1], [0, 1]]).joint == {((0, (0,)), (1, (0,))): 5}
    assert kept(whole, [[0, 1], [1]]).joint == {}


@pytest.mark.parametrize("seed", range(12))
def test_the_model_knows_joint_terms_of_either_sign_and_the_largest_of_its_rows(seed):
    """Without checks in floats and cuts, which would mend a model that is wrong."""
    form = form_of(replace(rich(seed), objective=("memory",), links=()))
    parts = form.quantities["memory"]
    sizes = tuple(len(group.options) for group in form.groups)
    rows = rows_of(parts, None, bits=30)
    found = run(Task(sizes, rows, {}), Clock(10.0))
    every = itertools.product(*map(range, sizes))
    assert rows[0].bound(found.least) == min(
        max(value(part, picks) for part in parts) / 2 ** parts[0].shift for picks in every
    )


def value(part, picks) -> int:
    met = (
        term
        for meeting, term in part.joint.items()
        if all(picks[g] in options for g, options in meeting)
    )
    return part.constant + sum(t[i] for t, i in zip(part.single, picks, strict=True)) + sum(met)


@pytest.mark.parametrize("seed", range(20))
def test_the_start_of_a_limited_problem_keeps_the_best_plan(seed):
    problem = replace(layers(6, seed, untied=True), objective=("latency",))
    want = brute_force.solve(problem)
    search = Search(problem, form_of(problem), "latency", limits_of(problem), Clock(10.0))
    left, level = start(search, want.assignment)
    assert level.bound <= want.values["latency"]
    assert all(i is not None for i in left.form.picks(want.assignment))
