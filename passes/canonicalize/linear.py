"""addmm(b, x, w), mm(x, w), matmul(x, w)  ->  linear(x, wᵀ, b)      w a weight, or its transpose

The transpose of a weight is a constant that later stages fold; a transpose of a transpose is none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from mpq_fx.graph import insert_call, is_weight, value

aten = torch.ops.aten
LINEAR = aten.linear.default
PRODUCTS = (aten.mm.default, aten.matmul.default)
SWAPS = ((0, 1), (1, 0), (-1, -2), (-2, -1), (-1, 0), (0, -1), (1, -2), (-2, 1))


def spell_linear(gm: GraphModule) -> int:
    found = 0
    for node in list(gm.graph.nodes):
        operands = linear_operands(node)
        if operands is None:
            continue
        x, w, bias = operands
        args = (x, transposed(node, w)) if bias is None else (x, transposed(node, w), bias)
        node.replace_all_uses_with(insert_call(node, LINEAR, args))
        gm.graph.erase_node(node)
        found += 1
    return found


def linear_operands(node: Node) -> tuple[Node, Node, Node | None] | None:
    """(x, w, bias) of y = x @ w + bias with w [K, N] made of weights alone and x not, or None."""
    if node.target is aten.addmm.default and not node.kwargs:
        bias, x, w = node.args
    elif node.target in PRODUCTS:
        bias, (x, w) = None, node.args
    else:
        return None
    assert isinstance(x, Node)
    assert isinstance(w, Node)
    if not is_weight(w) or is_weight(x) or value(w).ndim != 2:
        return None
    if bias is not None and not _is_row(bias, value(w).shape[1]):
        return None
    return x, w, bias  # type: ignore[return-value]


def transposed(anchor: Node, w: Node) -> Node:
    """t(w), or v where w is t(v)."""
    if w.target in (aten.t.default, aten.numpy_T.default, aten.mT.default):
        return w.args[0]  # type: ignore[return-value]
    if w.target is aten.transpose.int and w.args[1:] in SWAPS:
        return w.args[0]  # type: ignore[return-value]
    if w.target is aten.permute.default and [*w.args[1]] in ([1, 0], [-1, -2], [-1, 0]):  # type: ignore[misc]
        return w.args[0]  # type: ignore[return-value]
    return insert_call(anchor, aten.t.default, (w,))


def _is_row(bias: Any, size: int) -> bool:
    return value(bias).ndim == 1 and value(bias).shape[0] == size
