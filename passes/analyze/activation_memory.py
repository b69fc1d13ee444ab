"""peak(choices) = max over ops of Σ bytes of the values between ops that are live there

A value is live from the op that makes it to the last op that reads it.  Views share the bytes of
what they look at; weights, and the inputs of a call, which are the caller's, do not count.  A value
that only sites read, all in one format whose scale is known before the call, is stored in it.  What
Inductor fuses away counts too: this is the peak of a graph that runs op by op.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch.fx import Node

from mpq_fx.facts import Choice, Site
from mpq_fx.formats import FORMATS
from mpq_fx.graph import arguments
from mpq_fx.passes.analyze.replay import Replayer
from mpq_fx.passes.analyze.sites import OPERANDS
from mpq_fx.passes.analyze.trace import Trace


@dataclass(frozen=True)
class Value:
    """What one op makes: its bytes in the user's precision, and the sites that decide on it."""

    bytes: int
    itemsize: int
    deciding: frozenset[str]  # of these the format is, if they agree; empty: the user's precision


Live = tuple[Value, ...]


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


def peak(live: Sequence[Live], choices: Mapping[str, Choice]) -> int:
    """Bytes at the op where most is live, each value in the format that the choices give it."""
    return max((sum(stored_bytes(v, choices) for v in found) for found in live), default=0)


def stored_bytes(value: Value, choices: Mapping[str, Choice]) -> int:
    """Bytes of one value: in its readers' format where they agree, else in the user's precision."""
    formats = {_stored_in(choices.get(site)) for site in value.deciding}
    fmt = formats.pop() if len(formats) == 1 else ""
    if not fmt:
        return value.bytes
    return math.ceil(value.bytes // value.itemsize * FORMATS[fmt].element.bits / 8)


def _stored_in(choice: Choice | None) -> str:
    """The format of what a choice reads; "" where it is stored as it is, and converted on reading:
    a scale that is computed on every call needs the whole value first.
    """
    if choice is None or choice.scaling == "dynamic" or choice.activation not in FORMATS:
        return ""
    return choice.activation


def _readers(owner: Node, owners: Mapping[Node, Node]) -> list[Node]:
    """What reads a value or a view of it, itself included."""
    family = [owner, *(n for n, own in owners.items() if own is owner)]
    return [owner, *(user for node in family for user in node.users)]


def _value(
    replay: Replayer, node: Node, owners: Mapping[Node, Node], size: int, itemsize: int
) -> Value:
    own = replay.sites.get(node.name)
    if own is not None and own.op == "residual":
        return Value(size, itemsize, frozenset({own.name}))
    readers = [n for n in _readers(node, owners) if owners.get(n) is not node]
    sites = [replay.sites.get(reader.name) for reader in readers]
    is_decided = all(
        site is not None and _reads(site, reader, node, owners)
        for site, reader in zip(sites, readers, strict=True)
    )
    return Value(
        size, itemsize, frozenset(s.name for s in sites if s) if is_decided else frozenset()
    )


def _reads(site: Site, reader: Node, owner: Node, owners: Mapping[Node, Node]) -> bool:
    """Does a site read a value as its activation, and not as its weight?"""
    if site.op == "residual" or str(reader.target) not in OPERANDS:
        return False
    operands = OPERANDS[str(reader.target)]
    x = arguments(reader)[operands.activation]
    return operands.kind in ("matmul", "attention") or owners.get(x) is owner
