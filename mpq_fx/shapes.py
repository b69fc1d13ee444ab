"""calls of one model in several shapes  ->  ms[u, c] = Σ over shapes of (share of calls) · ms

All shapes of one code run in one plan, so that a choice is worth what it saves over all calls: many
short ones, say, and few long ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mpq_fx.binding import Binding, Sizes, fresh, sizes_of
from mpq_fx.clock import Clock
from mpq_fx.facts import Choice, Table
from mpq_fx.passes.analyze.cost import latency
from mpq_fx.passes.analyze.edges import find_edges
from mpq_fx.passes.analyze.replay import replayer
from mpq_fx.passes.analyze.trace import trace
from mpq_fx.passes.lower.microbenchmark import milliseconds
from mpq_fx.passes.lower.target import Target

if TYPE_CHECKING:
    from mpq_fx.compiler import Graph

MOST = 4  # shapes that are measured: those of most calls
ENOUGH = 0.4  # share of the time budget after which no other shape is measured

Key = tuple[frozenset[str], Sizes]


@dataclass(frozen=True)
class Code:
    """A graph with the binding that observed its calls, and how to run them in float."""

    graph: Graph
    binding: Binding
    run_float: Callable[..., Any]


@dataclass(frozen=True)
class Shape:
    """Calls of one shape: how many there were, and one of them."""

    code: Code
    record: Sequence[Any]
    calls: int


@dataclass(frozen=True)
class Timed:
    """What latency is measured for: choices of each site, named as in the graph that is planned."""

    sites: Mapping[str, str]  # name in the model -> in that graph
    options: Mapping[str, tuple[Choice, ...]]
    ties: tuple[tuple[str, ...], ...]
    target: Target
    cache_dir: Any


def shapes_of(codes: Sequence[Code], clock: Clock) -> tuple[Shape, ...]:
    """The shape of most calls of the first code, and of all others those of most calls; what is
    left out is noted.
    """
    found: dict[Key, Shape] = {}
    for code in codes:
        for key, shape in _shapes(code).items():  # two codes may have run one shape
            known = found.get(key)
            found[key] = replace(known, calls=known.calls + shape.calls) if known else shape
    own = max((s for s in found.values() if s.code is codes[0]), key=lambda shape: shape.calls)
    rest = [shape for shape in found.values() if shape is not own]
    kept = (own, *sorted(rest, key=lambda shape: -shape.calls)[: MOST - 1])
    if len(kept) < len(found):
        share = sum(s.calls for s in kept) / sum(s.calls for s in found.values())
        clock.note(f"latency is that of {MOST} of {len(found)} shapes, {share:.0%} of the calls")
    return kept


def mean_latency(shapes: Sequence[Shape], timed: Timed, clock: Clock) -> tuple[Table, float | None]:
    """Milliseconds of a call on average: of each (unit, choice), of conversions, and of float."""
    tables: list[Table] = []
    for shape in shapes:
        if tables and clock.is_past(ENOUGH):
            clock.cut(f"latency of {len(tables)} of {len(shapes)} shapes was measured")
            break
        tables.append(_table(shape, timed))
    first, shapes = tables[0], shapes[: len(tables)]
    shares = [shape.calls / sum(each.calls for each in shapes) for shape in shapes]
    counted = {
        name: sum(table.provenance[name] for table in tables)
        for name in ("measured", "cached", "seconds")
    }
    facts = {**first.provenance, **counted, "shapes": len(tables)}
    mean = replace(
        first,
        values=_mean([table.values for table in tables], shares),
        pairs=_mean([table.pairs for table in tables], shares),
        provenance=facts,
    )
    if not timed.target.is_timed:
        return mean, None
    return mean, sum(s * _float_ms(shape) for s, shape in zip(shares, shapes, strict=True))


def _shapes(code: Code) -> dict[Key, Shape]:
    """A call of each shape that the code ran, and how many there were."""
    sites = frozenset(code.binding.site_names.values())
    records = {sizes_of(record): record for record in code.binding.records}
    return {
        (sites, sizes): Shape(code, record, code.binding.shapes[sizes])
        for sizes, record in records.items()
    }


def _table(shape: Shape, timed: Timed) -> Table:
    graph, binding = shape.code.graph, shape.code.binding
    values = binding.values()
    traced = trace(replayer(graph.gm, graph.sites, values), complete(graph, shape.record, values))
    names = {site.name: timed.sites[binding.site_names[site.name]] for site in graph.sites}
    edges = find_edges(graph.gm, graph.sites)
    return latency(
        tuple(replace(s, name=names[s.name]) for s in traced.concrete(graph.sites)),
        timed.options,
        timed.target,
        edges={names[reader]: names[maker] for reader, maker in edges.items()},
        ties=timed.ties,
        cache_dir=timed.cache_dir,
    )


def _mean(tables: Sequence[Mapping[Any, float]], shares: Sequence[float]) -> dict[Any, float]:
    """Σ share · table; a site or an edge that a shape has not costs it nothing."""
    found: dict[Any, float] = {}
    for table, share in zip(tables, shares, strict=True):
        for key, ms in table.items():
            found[key] = found.get(key, 0.0) + share * ms
    return found


def _float_ms(shape: Shape) -> float:
    graph = shape.code.graph
    args = fresh(complete(graph, shape.record, shape.code.binding.values()))
    return milliseconds(lambda: shape.code.run_float(*args))


def complete(graph: Graph, record: Sequence[Any], values: Mapping[str, Tensor]) -> Sequence[Any]:
    """A recorded call with the present parameters put back in their places."""
    return tuple(
        values[graph.names[k]] if k in graph.parameters else x for k, x in enumerate(record)
    )
