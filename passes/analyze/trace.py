"""one recorded call, operation by operation  ->  its outputs, shapes, and what shares memory"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from mpq_fx.facts import Site
from mpq_fx.passes.analyze.replay import Replayer
from mpq_fx.passes.analyze.sites import OPERANDS, macs_of


@dataclass(frozen=True)
class Trace:
    """What one call in the user's precision was like."""

    outputs: list[Any]
    shapes: Mapping[str, tuple[int, ...]]  # site -> of its activation
    macs: Mapping[str, int]  # site -> multiply-accumulates
    owners: Mapping[Node, Node]  # value -> the one whose memory it lies in
    made: Mapping[Node, tuple[int, int]]  # of each that made its memory: bytes, bytes per element

    def concrete(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        """The sites with the sizes of the call in place of symbols, to measure latency at."""
        return tuple(
            replace(
                site,
                input_shape=self.shapes[site.name],
                macs=self.macs.get(site.name, site.macs),  # none where nobody reads the result
            )
            for site in sites
        )


def trace(replay: Replayer, record: Sequence[Any]) -> Trace:
    """Run a call; a value lies in an operand's memory if their storages are the same."""
    env = replay.start(record)
    outside = set(env)
    shapes: dict[str, tuple[int, ...]] = {}
    macs: dict[str, int] = {}
    owners: dict[Node, Node] = {}
    made: dict[Node, tuple[int, int]] = {}
    for node in replay.gm.graph.nodes:
        if node.op == "output":
            return Trace(replay.finish(env, [node], {}), shapes, macs, owners, made)
        inputs = {n: env[n] for n in node.all_input_nodes}
        operands = {n: _storages(x) for n, x in inputs.items()}
        replay.step(env, node, {})
        if site := replay.sites.get(node.name):
            shapes[site.name] = tuple(inputs[_activation(node, site)].shape)
            if node in env and site.op != "residual":
                macs[site.name] = _macs(site, node, {**inputs, node: env[node]})
        if node in outside or node not in env:
            continue
        storages = _storages(env[node])
        base = next((n for n, held in operands.items() if held.keys() & storages.keys()), None)
        if base is not None:
            owners[node] = owners.get(base) or base
        elif storages:
            owners[node] = node
            made[node] = sum(storages.values()), _itemsize(env[node])
    raise AssertionError("a graph without an output node")


def _activation(node: Node, site: Site) -> Any:
    position = 0 if site.op == "residual" else OPERANDS[str(node.target)].activation
    return node.args[position]


def _macs(site: Site, node: Node, values: Mapping[Node, Any]) -> int:
    sizes = {n: x.shape for n, x in values.items() if isinstance(x, Tensor)}
    return macs_of(node, site.op, OPERANDS[str(node.target)], sizes.__getitem__)


def _storages(value: Any) -> dict[int, int]:
    """{address: bytes} of what a value, perhaps a tuple of tensors, occupies."""
    tensors = [x for x in tree_leaves(value) if isinstance(x, Tensor)]
    found = [x.untyped_storage() for x in tensors]
    return {s.data_ptr(): s.nbytes() for s in found if s.nbytes()}


def _itemsize(value: Any) -> int:
    return next(x.itemsize for x in tree_leaves(value) if isinstance(x, Tensor))
