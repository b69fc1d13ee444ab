"""noise[u, c] = error(graph with unit u in choice c)² − error(graph)²: every single measured by
replay.

A metric is a function (replay, options, records, *, ties, excluded, deadline) -> Table; METRICS in
mpq_fx.passes lists them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from mpq_fx.facts import Choice, Table
from mpq_fx.passes.analyze.replay import Replayer, output_error

Options = Mapping[str, tuple[Choice, ...]]
Ties = Sequence[tuple[str, ...]]


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
    unchanged prefix is computed once per record; a pair costs only the suffix.  A further record is
    begun only if it should end by `deadline` (time.monotonic): else the table rests on fewer, and
    says so.
    """
    begin, used = time.monotonic(), 0
    sums: dict[tuple[str, str], list[float]] = {}
    units = units_of(options, ties)
    for inputs in records:
        now = time.monotonic()
        if used and now + (now - begin) / used > deadline:
            break
        for key, power in _one_record(replay, options, units, inputs, excluded):
            sums.setdefault(key, []).append(power)
        used += 1
    floats = {(site, kept[0].name): 0.0 for site, kept in options.items()}
    return Table(
        "measured_singles",
        "noise_power",
        {**floats, **{key: sum(seen) / len(seen) for key, seen in sums.items()}},
        spread={**floats, **{key: max(seen) - min(seen) for key, seen in sums.items()}},
        provenance={
            "records": used,
            "of": len(records),
            "seconds": round(time.monotonic() - begin, 3),
            "forward_passes": used * (1 + sum(len(options[u[0]]) - 1 for u in units) / 2),
        },
    )


def units_of(options: Options, ties: Ties) -> list[tuple[str, ...]]:
    """The sites that change together: each tie, and every other site by itself."""
    tied = {site: tie for tie in ties for site in tie}
    return list(dict.fromkeys(tied.get(site, (site,)) for site in options))


def _one_record(
    replay: Replayer,
    options: Options,
    units: Sequence[tuple[str, ...]],
    inputs: Sequence[Any],
    excluded: frozenset[int],
) -> list[tuple[tuple[str, str], float]]:
    """((site, choice), noise power) of every choice but float; one walk along the graph."""
    nodes = list(replay.gm.graph.nodes)
    unit_of = {site: unit for unit in units for site in unit}
    reference, env = replay.run(inputs, {}), replay.start(inputs)
    found, seen = [], set()
    for at, node in enumerate(nodes):
        if node.op == "output":
            break
        site = replay.sites.get(node.name)
        unit = unit_of.get(site.name, ()) if site else ()
        if unit and unit not in seen:
            seen.add(unit)
            for choice in options[unit[0]][1:]:
                outputs = replay.finish(dict(env), nodes[at:], dict.fromkeys(unit, choice))
                power = output_error(outputs, reference, excluded) ** 2 / len(unit)
                found += [((name, choice.name), power) for name in unit]
            replay.forget(unit)
        replay.step(env, node, {})
    return found
