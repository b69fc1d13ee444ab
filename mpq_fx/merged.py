"""plans of the graphs of one model  ->  its plan: what adds up is added, else the worst counts

Graphs run one after the other.  Milliseconds, bytes and bits · MACs add up, and so do the noise
powers of their errors; mean bits are means over all weights; of what is in memory at once the
larger peak counts, and of errors and tolerances the larger.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import reduce

from mpq_fx.describe import FRONTIER_POINTS, FRONTIER_SECONDS
from mpq_fx.facts import Plan, SolverFacts, Table
from mpq_fx.passes.allocate.problem import ERROR, NOISE, relative_gap
from mpq_fx.problem import LIMITED, MEMORY
from mpq_fx.resolve import OBJECTIVES, frontier

Numbers = Mapping[str, float]


def distinct(plans: Iterable[Plan | None]) -> list[Plan]:
    """Every plan once: graphs that differ in shapes alone share theirs."""
    return list({id(plan): plan for plan in plans if plan is not None}.values())


def merged(plans: Sequence[Plan]) -> Plan:
    """One plan for one model; that of a model with one graph stays as it is."""
    if len(plans) == 1:
        return plans[0]
    weights = sum(plan.baseline["weights"] for plan in plans)
    whole = reduce(_merged, (_of_whole(plan, weights) for plan in plans))
    found = (
        frontier(whole, name, FRONTIER_POINTS, time_limit=FRONTIER_SECONDS) for name in OBJECTIVES
    )
    return replace(whole, points=tuple(itertools.chain(*found)))


def _merged(one: Plan, other: Plan) -> Plan:
    winner = one.winner if one.winner == other.winner else "plan"
    return replace(
        one,
        choices={**one.choices, **other.choices},
        ledger=(*one.ledger, *other.ledger),
        error=max(one.error or 0.0, other.error or 0.0),
        tolerance=_greater(one.tolerance, other.tolerance),
        latency_ms=_variants(one, other, "latency_ms", _sum),
        errors=_variants(one, other, "errors", max),
        activation_bytes=_variants(one, other, "activation_bytes", max),
        winner=winner,
        budgets=_limits(one.budgets, other.budgets),
        baseline=_limits(one.baseline, other.baseline),
        tables={name: _joined(table, other.tables[name]) for name, table in one.tables.items()},
        ties=(*one.ties, *other.ties),
        live=(*one.live, *other.live),
        solver=_both(one.solver, other.solver),
        points=(),  # each was of one graph
        notes=tuple(dict.fromkeys((*one.notes, *other.notes))),
        fingerprint={"sites": {**one.fingerprint["sites"], **other.fingerprint["sites"]}},
        tensors={**one.tensors, **other.tensors},
    )


def _sum(a: float, b: float) -> float:
    return a + b


def _greater(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else max(a, b)


def _variants(one: Plan, other: Plan, field: str, join: Callable[[float, float], float]) -> Numbers:
    """Of the variants that both graphs have, and of what runs, which may be two."""
    a, b = getattr(one, field), getattr(other, field)
    found = {name: join(a[name], b[name]) for name in a if name in b}
    if one.winner in a and other.winner in b and one.winner != other.winner:
        found["plan"] = join(a[one.winner], b[other.winner])
    return found


def _limits(one: Numbers, other: Numbers) -> dict[str, float]:
    """Budgets, or what the float model uses: sums, of peaks and tolerances the larger."""
    largest = {MEMORY, "tolerance", *(name for name, at in LIMITED.items() if at == MEMORY)}
    return {
        name: (max if name in largest else _sum)(one.get(name, 0.0), other.get(name, 0.0))
        for name in {**one, **other}
    }


def _joined(table: Table, other: Table) -> Table:
    """The numbers of two graphs, whose sites are not the same."""
    return replace(
        table,
        values={**table.values, **other.values},
        pairs={**table.pairs, **other.pairs},
        spread={**table.spread, **other.spread},
    )


def _both(one: SolverFacts | None, other: SolverFacts | None) -> SolverFacts | None:
    """What is proved of each graph holds for the sum; objectives are sums."""
    if one is None or other is None:
        return None
    value, bound = one.value + other.value, one.bound + other.bound
    is_optimal = one.status == other.status == "OPTIMAL"
    return SolverFacts(
        "OPTIMAL" if is_optimal else "FEASIBLE",
        one.objective,
        value,
        bound,
        relative_gap(value, bound),
        one.seconds + other.seconds,
    )


def _of_whole(plan: Plan, weights: float) -> Plan:
    """Mean bits of one graph -> its share of the mean over the weights of all graphs; noise powers
    in the unit of the outputs, so that those of all graphs compare.
    """
    share = plan.baseline["weights"] / max(weights, 1.0)
    unit = {"bits": share, ERROR: 1.0 / plan.error_scale, NOISE: 1.0 / plan.error_scale}
    is_error = plan.solver is not None and plan.solver.objective[0] == ERROR
    return replace(
        plan,
        tables={name: _times(unit.get(name, 1.0), table) for name, table in plan.tables.items()},
        baseline={**plan.baseline, "bits": plan.baseline["bits"] * share},
        budgets={
            name: value * (share if LIMITED.get(name) == "bits" else 1.0)
            for name, value in plan.budgets.items()
        },
        solver=_scaled(plan.solver, unit[ERROR]) if is_error else plan.solver,
        error_scale=1.0,
    )


def _times(factor: float, table: Table) -> Table:
    return replace(
        table,
        values={key: factor * value for key, value in table.values.items()},
        pairs={key: factor * value for key, value in table.pairs.items()},
        spread={key: factor * value for key, value in table.spread.items()},
    )


def _scaled(found: SolverFacts | None, factor: float) -> SolverFacts | None:
    if found is None:
        return None
    return replace(found, value=factor * found.value, bound=factor * found.bound)
