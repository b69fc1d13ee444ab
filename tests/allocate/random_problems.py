"""Small random problems with everything that a Problem can hold: brute force solves them, too."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from mpq_fx.errors import ConfigError
from mpq_fx.passes.allocate import Problem, values_of
from mpq_fx.passes.allocate.problem import Condition, Term

# Decimal steps, so that sums of equal numbers in another order meet a budget exactly, or nearly.
COST = st.one_of(st.integers(0, 9).map(float), st.integers(0, 90).map(lambda n: n / 10))
NOISE = st.one_of(COST, st.integers(-30, 30).map(lambda n: n / 10))
SHARES = st.sampled_from((0.8, 1.0, 1.0, 1.2))


@st.composite
def problems(draw: Any, *, coupled: bool = True) -> Problem:
    """Up to 5 units of up to 3 options; pairs of either sign, edges, ties, links, forced, peaks of
    joint terms, budgets, floors.
    """
    names = ("a", "b", "c", "d", "e")[: draw(st.integers(1, 5))]
    options = {u: ("w8", "w4", "w2")[: draw(st.integers(1, 3))] for u in names}
    resources = {r: _table(draw, options, COST) for r in ("latency", "size")}
    tables = {"error": _table(draw, options, NOISE), **resources}
    peaks = {"memory": _peak(draw, options)} if draw(st.booleans()) else {}
    units = st.sampled_from(names)
    objectives = st.permutations((*tables, *peaks))
    set_of_units = st.lists(units, min_size=2, max_size=3, unique=True).map(tuple)
    several = set_of_units if len(names) > 1 else st.tuples(units, units)
    given = {
        "options": options,
        "error": tables["error"],
        "objective": tuple(draw(objectives)[: draw(st.integers(1, 3))]),
        "pairs": _coupling(draw, options, NOISE) if coupled else {},
        "resources": resources,
        "edges": {"latency": _coupling(draw, options, COST)} if coupled else {},
        "budgets": {**_limits(draw, options, tables), **_memory(draw, options, peaks)},
        "floors": draw(st.one_of(st.just({}), _floors(options, tables))),
        "peaks": peaks,
        "ties": draw(st.one_of(st.just(()), st.tuples(st.tuples(units, units)))),
        "forced": dict.fromkeys(draw(st.sets(units, max_size=1)), "w8"),
        "links": draw(st.one_of(st.just(()), st.lists(several, max_size=2).map(tuple))),
        "classes": {(u, "w4"): "w8" for u in draw(st.sets(units)) if "w4" in options[u]},
    }
    try:
        return Problem(**given)
    except ConfigError:  # a tie or a link of units that have nothing in common
        return Problem(**{**given, "links": (), "ties": ()})


def _table(draw: Any, options: Any, cost: Any) -> dict[tuple[str, str], float]:
    return {(u, o): draw(cost) for u, offers in options.items() for o in offers}


def _coupling(draw: Any, options: Any, cost: Any) -> dict[tuple[str, str, str, str], float]:
    keys = [
        (u, o, v, p)
        for u in options
        for v in options
        if u != v
        for o in options[u]
        for p in options[v]
    ]
    chosen = draw(st.lists(st.sampled_from(keys), max_size=8, unique=True)) if keys else []
    return {key: draw(cost) for key in chosen}


def _peak(draw: Any, options: Any) -> tuple[tuple[Term, ...], ...]:
    """Up to 4 sums of a constant and up to 4 terms, where up to 3 units take certain options."""
    counts = st.lists(st.sampled_from((1, 1, 2, 2, 3)), min_size=1, max_size=4)
    return tuple(
        (
            Term(draw(COST)),
            *(
                Term(draw(NOISE), tuple(_condition(draw, options) for _ in range(conditions)))
                for conditions in draw(counts)
            ),
        )
        for _ in range(draw(st.integers(0, 4)))
    )


def _condition(draw: Any, options: Any) -> Condition:
    unit = draw(st.sampled_from(sorted(options)))
    return Condition(unit, tuple(sorted(draw(st.sets(st.sampled_from(options[unit]), min_size=1)))))


def _limits(draw: Any, options: Any, tables: Any) -> dict[str, float]:
    """Near the use of some assignment, so that about half of the problems are feasible."""
    budgets = {}
    for name in sorted(draw(st.sets(st.sampled_from(sorted(tables))))):
        used = sum(tables[name][u, draw(st.sampled_from(offers))] for u, offers in options.items())
        budgets[name] = max(0.0, used * draw(SHARES))
    return budgets


def _memory(draw: Any, options: Any, peaks: Any) -> dict[str, float]:
    """Near the peak of some assignment."""
    plan = {unit: draw(st.sampled_from(offers)) for unit, offers in options.items()}
    budgets = {}
    for name, sums in peaks.items():
        used = max(
            (
                sum(t.value for t in terms if all(plan[c.unit] in c.options for c in t.when))
                for terms in sums
            ),
            default=0.0,
        )
        if draw(st.booleans()):
            budgets[name] = max(0.0, used * draw(SHARES))
    return budgets


@st.composite
def _floors(draw: Any, options: Any, tables: Any) -> dict[str, float]:
    name = draw(st.sampled_from(sorted(tables)))
    used = sum(tables[name][u, draw(st.sampled_from(offers))] for u, offers in options.items())
    return {name: used * draw(SHARES)}


def rich(seed: int, *, coupled: bool = True) -> Problem:
    """Every kind of limit at once, each near what some plan needs; hypothesis likes small ones."""
    rng = random.Random(seed)
    options = dict.fromkeys("abcde", ("w8", "w4", "w2"))
    keys = [(u, o) for u in options for o in options[u]]
    tables = {n: {key: float(rng.randint(0, 20)) for key in keys} for n in ("size", "latency")}
    pairs = {}
    for (u, o), (v, p) in zip(keys, rng.sample(keys, len(keys)), strict=True):
        if u != v and coupled:
            pairs[u, o, v, p] = float(rng.randint(-9, 9))
    problem = Problem(
        options=options,
        error={key: float(rng.randint(0, 20)) for key in keys},
        objective=(rng.choice(("error", "latency", "memory")), "size"),
        pairs=pairs,
        resources=tables,
        peaks={"memory": tuple(_rich_sum(rng, options) for _ in range(4))},
        ties=(("a", "d"),) if rng.random() < 0.3 else (),
        links=(("a", "c"), ("b", "e"), ("c", "d"))[: rng.randint(0, 3)],
        classes={(u, "w4"): "w8" for u in rng.sample("abcde", 3)},
    )
    plan = {unit: rng.choice(offers) for unit, offers in options.items()}
    near = {n: at * rng.choice((0.8, 1.0, 1.2)) for n, at in values_of(problem, plan).items()}
    budgets = {n: near[n] for n in ("size", "memory") if near[n] > 0.0}
    return replace(problem, budgets=budgets, floors={rng.choice(("latency", "size")): near["size"]})


def _rich_sum(rng: random.Random, options: Any) -> tuple[Term, ...]:
    terms = [Term(float(rng.randint(10, 20)))]
    for count in (1, 1, 2, 2, 3):
        units = rng.sample(sorted(options), count)
        when = tuple(Condition(u, tuple(rng.sample(options[u], rng.randint(1, 2)))) for u in units)
        terms.append(Term(float(rng.randint(-9, 4)), when))
    return tuple(terms)
