"""linear(x, q), linear(x, k), linear(x, v)  ->  split(linear(x, cat(q, k, v)))

One matmul instead of three reads x once and pays one call.  Row-wise scales make the codes of the
joined weight the codes of its parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from mpq_fx.facts import Choice, Site
from mpq_fx.graph import SITE, insert_call, value

aten = torch.ops.aten


def merge_linear(gm: GraphModule, sites: Sequence[Site], choices: Mapping[str, Choice]) -> int:
    """Join linear sites that read one tensor and made the same choice, other than float."""
    groups: dict[tuple[Node, Choice], list[Node]] = {}
    by_node = {site.node: site for site in sites if site.op == "linear"}
    for node in gm.graph.nodes:
        site = by_node.get(node.name)
        choice = choices.get(site.name) if site else None
        if site and choice and choice.weight != site.dtype and node.target is aten.linear.default:
            groups.setdefault((node.args[0], choice), []).append(node)
    merged = [nodes for nodes in groups.values() if len(nodes) > 1]
    for nodes in merged:
        _merge(nodes)
    return len(merged)


def _merge(nodes: Sequence[Node]) -> None:
    """The first of the nodes becomes the joined linear; all become slices of it."""
    anchor, x = nodes[0], nodes[0].args[0]
    for node in nodes:  # operands must stand before the joined call
        for operand in node.args[1:]:
            _hoist(operand, anchor)
    rows = [value(node).shape[-1] for node in nodes]
    w = insert_call(anchor, aten.cat.default, ([node.args[1] for node in nodes],))
    y = insert_call(anchor, aten.linear.default, (x, w, _joined_bias(nodes, anchor)))
    y.meta[SITE] = tuple(name for node in nodes for name in node.meta[SITE])
    start = 0
    for node, count in zip(nodes, rows, strict=True):
        part = insert_call(node, aten.slice.Tensor, (y, -1, start, start + count))
        node.replace_all_uses_with(part)
        node.graph.erase_node(node)
        start += count


def _joined_bias(nodes: Sequence[Node], anchor: Node) -> Node | None:
    biases = [(*node.args, None)[2] for node in nodes]
    if all(bias is None for bias in biases):
        return None
    parts = [
        bias if bias is not None else _zeros(node, anchor)
        for bias, node in zip(biases, nodes, strict=True)
    ]
    return insert_call(anchor, aten.cat.default, (parts,))


def _zeros(node: Node, anchor: Node) -> Node:
    """A bias of zeros, computed from the weight so that it folds with it."""
    column = insert_call(anchor, aten.select.int, (node.args[1], 1, 0))
    return insert_call(anchor, aten.zeros_like.default, (column,))


def _hoist(operand: Any, anchor: Node) -> None:
    """Move what a weight is computed from in front of the anchor; placeholders stand there
    already.
    """
    if not isinstance(operand, Node) or operand.op == "placeholder" or operand < anchor:
        return
    for before in operand.all_input_nodes:
        _hoist(before, anchor)
    anchor.prepend(operand)
