"""noise[u, c] = error(graph with unit u in choice c)² − error(graph)²: every single measured by
replay.

A metric is a function (replay, options, records, reference, deadline) -> Table; METRICS in
mpq_fx.passes lists them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch.fx import Node

from mpq_fx.facts import Choice, Site, Table
from mpq_fx.passes.analyze.replay import Replayer, output_error

Options = Mapping[str, tuple[Choice, ...]]


def measured_singles(
    replay: Replayer,
    options: Options,
    records: Sequence[Sequence[Any]],
    *,
    excluded: frozenset[int] = frozenset(),
    deadline: float = float("inf"),
) -> Table:
    """Error of each (unit, choice) alone, all else float, squared and averaged over `records`.

    The unchanged prefix is computed once per record; a pair costs only the suffix.  A further
    record is begun only if it should end by `deadline` (time.monotonic): else the table rests on
    fewer, and says so.
    """
    begin, used = time.monotonic(), 0
    sums: dict[tuple[str, str], list[float]] = {}
    for inputs in records:
        now = time.monotonic()
        if used and now + (now - begin) / used > deadline:
            break
        for key, error in _one_record(replay, options, inputs, excluded):
            sums.setdefault(key, []).append(error**2)
        used += 1
    values = {key: sum(seen) / len(seen) for key, seen in sums.items()}
    spread = {key: max(seen) - min(seen) for key, seen in sums.items()}
    return Table(
        "measured_singles",
        "noise_power",
        values,
        spread=spread,
        provenance={
            "records": used,
            "of": len(records),
            "seconds": round(time.monotonic() - begin, 3),
            "forward_passes": used * (1 + sum(map(len, options.values())) / 2),
        },
    )


def _one_record(
    replay: Replayer, options: Options, inputs: Sequence[Any], excluded: frozenset[int]
) -> list[tuple[tuple[str, str], float]]:
    nodes = list(replay.gm.graph.nodes)
    reference = replay.run(inputs, {})
    env = replay.start(inputs)
    found = []
    for at, node in enumerate(nodes):
        if node.op == "output":
            return found
        site = replay.sites.get(node.name)
        if site is None:
            replay.step(env, node, {})
            continue
        for choice in options.get(site.name, ()):
            outputs = _suffix(replay, dict(env), nodes[at:], site, choice)
            found.append(((site.name, choice.name), output_error(outputs, reference, excluded)))
        replay.step(env, node, {})
    raise AssertionError("a graph without an output node")


def _suffix(
    replay: Replayer, env: dict[Node, Any], nodes: Sequence[Node], site: Site | None, choice: Choice
) -> list[Any]:
    assert site is not None
    outputs = replay.finish(env, nodes, {site.name: choice})
    replay.weights.pop((site.name, choice.weight), None)  # one fake-quantized weight at a time
    return outputs
