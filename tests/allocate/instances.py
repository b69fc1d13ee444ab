"""Random allocation problems: small ones for the oracle, large ones with a known shape."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import strategies as st

from mpq_fx.passes.allocate.problem import Problem

# Decimal steps, so that sums of equal numbers in another order meet a budget exactly, or nearly.
COST = st.one_of(st.integers(0, 9).map(float), st.integers(0, 90).map(lambda n: n / 10))
NOISE = st.one_of(COST, st.integers(-30, 30).map(lambda n: n / 10))


@st.composite
def problems(draw: Any, *, coupled: bool = True) -> Problem:
    """Up to 5 units of up to 3 options; pairs of either sign, edges, ties, forced, budgets."""
    names = ("a", "b", "c", "d", "e")[: draw(st.integers(1, 5))]
    options = {u: ("w8", "w4", "w2")[: draw(st.integers(1, 3))] for u in names}
    resources = {r: _table(draw, options, COST) for r in ("latency", "size")}
    error = _table(draw, options, NOISE)
    units = st.sampled_from(names)
    objectives = st.permutations(("error", "latency", "size"))
    return Problem(
        options=options,
        error=error,
        objective=tuple(draw(objectives)[: draw(st.integers(1, 3))]),
        pairs=_coupling(draw, options, NOISE) if coupled else {},
        resources=resources,
        edges={"latency": _coupling(draw, options, COST)} if coupled else {},
        budgets=_budgets(draw, options, {"error": error, **resources}),
        ties=draw(st.one_of(st.just(()), st.tuples(st.tuples(units, units)))),
        forced={u: "w8" for u in draw(st.sets(units, max_size=1))},
    )


def _table(draw: Any, options: Any, cost: Any) -> dict[tuple[str, str], float]:
    return {(u, o): draw(cost) for u, offers in options.items() for o in offers}


def _coupling(draw: Any, options: Any, cost: Any) -> dict[tuple[str, str, str, str], float]:
    keys = [(u, o, v, p) for u in options for v in options if u != v for o in options[u] for p in options[v]]
    chosen = draw(st.lists(st.sampled_from(keys), max_size=8, unique=True)) if keys else []
    return {key: draw(cost) for key in chosen}


def _budgets(draw: Any, options: Any, tables: Any) -> dict[str, float]:
    """Near the use of some assignment, so that about half of the problems are feasible."""
    budgets = {}
    for name in sorted(draw(st.sets(st.sampled_from(sorted(tables))))):
        used = sum(tables[name][u, draw(st.sampled_from(offers))] for u, offers in options.items())
        budgets[name] = max(0.0, used * draw(st.sampled_from((0.8, 1.0, 1.0, 1.2))))
    return budgets


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
    most = {n: sum(t[u, names[-1]] for u in offers) for n, t in (("latency", latency), ("size", size))}
    return Problem(
        options=offers,
        error=error,
        objective=("error",),
        resources={"latency": latency, "size": size},
        budgets={"latency": 0.52 * most["latency"], "size": 0.5 * most["size"]},
    )
