"""noise[u, c] = error(graph with unit u in choice c)² − error(graph)²: every single measured by
replay.

A metric is a function (replay, options, records, *, ties, excluded, deadline) -> Table; METRICS in
mpq_fx.passes lists them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from mpq_fx.facts import Choice, Table
from mpq_fx.passes.analyze.replay import Replayer, output_error

Unit = tuple[str, ...]
Kind = tuple[str, ...]
Options = Mapping[str, tuple[Choice, ...]]
Ties = Sequence[Unit]


def measured_singles(
    replay: Replayer,
    options: Options,
    records: Sequence[Sequence[Any]],
    *,
    ties: Ties = (),
    excluded: frozenset[int] = frozenset(),
    deadline: float = float("inf"),
) -> Table:
    """Error of each (unit, choice) alone, all else float, squared and averaged over `records`.

    Sites of a tie change together, as they will in every plan, and share the noise evenly.  The
    unchanged prefix is computed once per record; a pair costs only the suffix.

    `deadline` is a time.monotonic().  A further record is begun only if it should end by then.  In
    the first one a unit for which there is no time takes the median of its like, see `on_pace`.
    The provenance tells how many records there were and which sites are estimates.
    """
    begin, used = time.monotonic(), 0
    sums: dict[tuple[str, str], list[float]] = {}
    units = units_of(options, ties)
    kinds = kinds_of(replay, options, units)
    wanted = on_pace(kinds, begin, deadline)
    for inputs in in_time(records, begin, deadline):
        reference, measured = replay.run(inputs, {}), set()
        for unit, choice, outputs in singles(replay, options, units, inputs, wanted):
            power = output_error(outputs, reference, excluded) ** 2 / len(unit)
            for site in unit:
                sums.setdefault((site, choice.name), []).append(power)
            measured.add(unit)
        used, wanted = used + 1, measured.__contains__
    provenance = provenance_of(used, len(records), begin, options, units)
    return table_of("measured_singles", options, kinds, sums, provenance)


def provenance_of(
    used: int, of: int, begin: float, options: Options, units: Sequence[Unit]
) -> dict[str, Any]:
    """What the singles of `used` records have cost; a suffix counts as half a forward pass."""
    return {
        "records": used,
        "of": of,
        "seconds": round(time.monotonic() - begin, 3),
        "forward_passes": used * (1 + sum(len(options[u[0]]) - 1 for u in units) / 2),
    }


def in_time(
    records: Sequence[Sequence[Any]], begin: float, deadline: float
) -> Iterator[Sequence[Any]]:
    """The first record, and each further one that should be done by the deadline."""
    for used, inputs in enumerate(records):
        now = time.monotonic()
        if used and now + (now - begin) / used > deadline:
            return
        yield inputs


def table_of(
    metric: str,
    options: Options,
    kinds: Mapping[Unit, Kind],
    sums: Mapping[tuple[str, str], Sequence[float]],
    provenance: Mapping[str, Any],
) -> Table:
    """Means and ranges over the records, zeros for float, estimates for the rest."""
    means = {key: sum(seen) / len(seen) for key, seen in sums.items()}
    spread = {key: max(seen) - min(seen) for key, seen in sums.items()}
    floats = {(site, kept[0].name): 0.0 for site, kept in options.items()}
    guesses = estimated(options, kinds, means)
    return Table(
        metric,
        "noise_power",
        {**floats, **guesses, **means},
        spread={**floats, **spread},
        provenance={**provenance, "estimated": sorted({site for site, _ in guesses})},
    )


def kinds_of(replay: Replayer, options: Options, units: Sequence[Unit]) -> dict[Unit, Kind]:
    """What a unit has in common with its like: the op, and what it may run in."""
    ops = {site.name: site.op for site in replay.sites.values()}
    return {u: (ops[u[0]], *(choice.name for choice in options[u[0]])) for u in units}


def on_pace(kinds: Mapping[Unit, Kind], begin: float, deadline: float) -> Callable[[Unit], bool]:
    """Is there time for a unit?  For the first of each kind always; for the k-th of n while no more
    than k / n of the time is used, so that what is left out is spread over the whole graph.
    """
    share, known = (deadline - begin) / max(1, len(kinds)), set()
    position = {unit: k + 1 for k, unit in enumerate(kinds)}

    def is_wanted(unit: Unit) -> bool:
        is_new = kinds[unit] not in known
        known.add(kinds[unit])
        return is_new or time.monotonic() <= begin + share * position[unit]

    return is_wanted


def estimated(
    options: Options, kinds: Mapping[Unit, Kind], means: Mapping[tuple[str, str], float]
) -> dict[tuple[str, str], float]:
    """For each unit that was not measured the median, per choice, of those of its kind."""
    known: dict[tuple[Kind, str], list[float]] = {}
    for (site, choice), power in means.items():
        unit = next(u for u in kinds if site in u)
        known.setdefault((kinds[unit], choice), []).append(power * len(unit))
    return {
        (site, choice.name): median(known[kind, choice.name]) / len(unit)
        for unit, kind in kinds.items()
        for choice in options[unit[0]][1:]
        for site in unit
        if (site, choice.name) not in means
    }


def units_of(options: Options, ties: Ties) -> list[Unit]:
    """The sites that change together: each tie, and every other site by itself."""
    tied = {site: tie for tie in ties for site in tie}
    return list(dict.fromkeys(tied.get(site, (site,)) for site in options))


def singles(
    replay: Replayer,
    options: Options,
    units: Sequence[Unit],
    inputs: Sequence[Any],
    is_wanted: Callable[[Unit], bool] = lambda unit: True,
) -> Iterator[tuple[Unit, Choice, list[Any]]]:
    """(unit, choice, outputs with this unit alone in this choice) in one walk along the graph."""
    nodes = list(replay.gm.graph.nodes)
    unit_of = {site: unit for unit in units for site in unit}
    env, left = replay.start(inputs), set(units)
    for at, node in enumerate(nodes):
        if node.op == "output":
            return
        site = replay.sites.get(node.name)
        unit = unit_of.get(site.name) if site else None
        if unit is not None and unit in left:
            left.remove(unit)
            if is_wanted(unit):
                for choice in options[unit[0]][1:]:
                    changed = dict.fromkeys(unit, choice)
                    yield unit, choice, replay.finish(dict(env), nodes[at:], changed)
                replay.forget(unit)
        replay.step(env, node, {})
