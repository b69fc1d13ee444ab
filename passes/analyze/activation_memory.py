"""graph  ->  the values between ops that are in memory at once

A value is live from the op that makes it to the last op that reads it.  Views share the bytes of
what they look at; weights, and the inputs of a call, which are the caller's, do not count.  What
Inductor fuses away counts too: this is the peak of a graph that runs op by op.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch.fx import Node

from mpq_fx.facts import Live, Site, Value
from mpq_fx.graph import arguments
from mpq_fx.passes.analyze.replay import Replayer
from mpq_fx.passes.analyze.sites import OPERANDS
from mpq_fx.passes.analyze.trace import Trace


def live_sets(replay: Replayer, traced: Trace) -> tuple[Live, ...]:
    """What is live at each op of one recorded call, without sets that are part of another."""
    owners, bytes_of = traced.owners, traced.made
    order = {node: k for k, node in enumerate(replay.gm.graph.nodes)}
    values = {node: _value(replay, node, owners, *bytes_of[node]) for node in bytes_of}
    last = {node: max(order[user] for user in _readers(node, owners)) for node in values}
    sets = {frozenset(n for n in values if order[n] <= order[at] <= last[n]): None for at in values}
    maximal = [found for found in sets if not any(found < other for other in sets)]
    return tuple(
        tuple(values[n] for n in sorted(found, key=order.__getitem__)) for found in maximal
    )


def _readers(owner: Node, owners: Mapping[Node, Node]) -> list[Node]:
    """What reads a value or a view of it, itself included."""
    family = [owner, *(n for n, own in owners.items() if own is owner)]
    return [owner, *(user for node in family for user in node.users)]


def _value(
    replay: Replayer, node: Node, owners: Mapping[Node, Node], size: int, itemsize: int
) -> Value:
    own = replay.sites.get(node.name)
    if own is not None and own.op == "residual":
        return Value(size, itemsize, (own.name,))
    readers = [n for n in _readers(node, owners) if owners.get(n) is not node]
    sites = [replay.sites.get(reader.name) for reader in readers]
    is_decided = all(
        site is not None and _reads(site, reader, node, owners)
        for site, reader in zip(sites, readers, strict=True)
    )
    names = {site.name for site in sites if site} if is_decided else ()
    return Value(size, itemsize, tuple(sorted(names)))


def _reads(site: Site, reader: Node, owner: Node, owners: Mapping[Node, Node]) -> bool:
    """Does a site read a value as its activation, and not as its weight?"""
    if site.op == "residual" or str(reader.target) not in OPERANDS:
        return False
    operands = OPERANDS[str(reader.target)]
    x = arguments(reader)[operands.activation]
    return operands.kind in ("matmul", "attention") or owners.get(x) is owner
