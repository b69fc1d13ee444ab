"""quantize(max_pool(x)), cast(max_pool(x)), quantize(view(x))  ->  the same in the other order

Rounding keeps order, so the largest code is the code of the largest value: narrowing first is exact
and moves a quarter of the bytes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

import mpq_fx.kernels  # noqa: F401 - defines torch.ops.mpq
from mpq_fx.graph import arguments, insert_call, value
from mpq_fx.passes.lower.constants import VIEWS
from mpq_fx.passes.rewrite.float_op import CAST

aten, mpq = torch.ops.aten, torch.ops.mpq
ORDERED = frozenset({aten.max_pool2d.default}) | VIEWS


def hoist_narrowing(gm: GraphModule) -> int:
    """Move a quantization or a narrowing cast in front of the poolings and views that it alone
    reads, as far as it goes.
    """
    found = 0
    for node in list(gm.graph.nodes):
        narrow = node
        while moved := _movable(narrow):
            narrow = _swap(gm, narrow, moved)
            found += 1
    return found


def _movable(node: Node) -> Node | None:
    """What a narrowing may be moved in front of."""
    before = node.args[0] if is_narrowing(node) else None
    if not isinstance(before, Node) or before.target not in ORDERED or len(before.users) != 1:
        return None
    dtype = value(node).dtype
    is_compared = not dtype.is_floating_point or dtype.itemsize > 1  # torch pools no 8-bit floats
    return before if before.target in VIEWS or is_compared else None


def _swap(gm: GraphModule, node: Any, moved: Any) -> Node:
    """narrow(move(x))  ->  move(narrow(x)); the new narrowing"""
    narrow = insert_call(node, node.target, (moved.args[0], *node.args[1:]))
    after = insert_call(node, moved.target, (narrow, *moved.args[1:]), dict(moved.kwargs))
    node.replace_all_uses_with(after)
    gm.graph.erase_node(node)
    gm.graph.erase_node(moved)
    return narrow


def is_narrowing(node: Node) -> bool:
    """A static quantization per tensor, or a cast from float32 to 16 bits."""
    if node.target is mpq.quantize.default:
        return value(arguments(node)[1]).numel() == 1
    if node.target is not CAST or len(node.args) != 2:
        return False
    source, dtype = arguments(node)
    return value(source).dtype == torch.float32 and dtype in (
        torch.bfloat16,
        torch.float16,
    )
