"""quantize(x), quantize(x)  ->  quantize(x) once, where format and scale are the same"""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Node

import mpq_fx.kernels  # noqa: F401 - defines torch.ops.mpq

mpq = torch.ops.mpq
CAST = torch.ops.aten.to.dtype


def merge_quantize(gm: GraphModule) -> int:
    """Equal casts and quantizations of one tensor become one; scales are compared by value."""
    seen: dict[object, Node] = {}
    found = 0
    for node in list(gm.graph.nodes):
        key = _key(gm, node)
        first = seen.setdefault(key, node) if key else node
        if first is not node:
            node.replace_all_uses_with(first)
            gm.graph.erase_node(node)
            found += 1
    return found


def _key(gm: GraphModule, node: Node) -> object:
    if node.target is mpq.quantize.default:
        x, scale, zero, fmt = node.args
        return node.target, x, _number(gm, scale), _number(gm, zero), fmt
    if node.target in (
        mpq.quantize_dynamic.default,
        mpq.quantize_weight.default,
        CAST,
        operator.getitem,
    ):
        return node.target, node.args
    return None


def _number(gm: GraphModule, node: object) -> object:
    """A scalar constant by its value, so that equal scales of two sites are one."""
    if isinstance(node, Node) and node.op == "get_attr":
        tensor = getattr(gm, str(node.target))
        return tensor.item() if tensor.numel() == 1 else node
    return node
