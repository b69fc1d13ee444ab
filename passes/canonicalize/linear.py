"""addmm(b, x, w), x @ w, x @ w.T, einsum that contracts one dimension  ->  linear(x, w', b)

w is a weight (computed from parameters alone); a transpose of it is a view that is folded later.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from mpq_fx.graph import insert_call, is_weight, value

aten = torch.ops.aten
TRANSPOSES = (aten.t.default, aten.numpy_T.default)


def canonicalize_linear(gm: GraphModule) -> int:
    """Every product of an activation and a 2-d weight spelled as linear."""
    found = 0
    for node in list(gm.graph.nodes):
        operands = SPELLINGS[node.target](node) if node.target in SPELLINGS else None
        if operands is None:
            continue
        x, w, bias = operands
        linear = insert_call(node, aten.linear.default, (x, w) if bias is None else (x, w, bias))
        node.replace_all_uses_with(linear)
        gm.graph.erase_node(node)
        found += 1
    return found


def from_addmm(node: Node) -> Any:
    """addmm(b, x, w) with unit factors and a bias of one row."""
    bias, x, w = node.args
    if node.kwargs or not is_matrix(w) or is_weight(x) or value(bias).dim() != 1:
        return None
    return (x, transposed(node, w), bias) if is_weight(bias) else None


def from_matmul(node: Node) -> Any:
    x, w = node.args
    if not is_matrix(w) or is_weight(x) or value(x).dim() < 2:
        return None
    return x, transposed(node, w), None


def from_einsum(node: Node) -> Any:
    """ "...k,nk->...n" and "...k,kn->...n" with x first."""
    equation, operands = node.args[:2]
    if "->" not in equation or len(operands) != 2 or not is_matrix(operands[1]):
        return None
    inputs, result = equation.replace(" ", "").split("->")
    left, right = inputs.split(",")
    if is_weight(operands[0]) or len(set(left)) != len(left) or left[:-1] != result[:-1]:
        return None
    if right == result[-1] + left[-1]:
        return operands[0], operands[1], None
    if right == left[-1] + result[-1] and result[-1] not in left:
        return operands[0], transposed(node, operands[1]), None
    return None


def is_matrix(w: Any) -> bool:
    return isinstance(w, Node) and is_weight(w) and value(w).dim() == 2


def transposed(anchor: Node, w: Node) -> Node:
    """w.T, or what w is the transpose of."""
    if w.target in TRANSPOSES or (
        w.target is aten.transpose.int and {*w.args[1:]} <= {0, 1, -1, -2}
    ):
        return w.args[0]  # type: ignore[return-value]
    return insert_call(anchor, aten.t.default, (w,))


SPELLINGS: dict[Any, Any] = {
    aten.addmm.default: from_addmm,
    aten.mm.default: from_matmul,
    aten.matmul.default: from_matmul,
    aten.einsum.default: from_einsum,
}
