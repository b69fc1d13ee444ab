"""linear(x, w) + b  ->  linear(x, w, b)      b a weight with one number per output
linear(x, w, c)  ->  linear(x, w) + c      c computed on every call; a convolution likewise

Kernels take a bias for a constant that belongs to the weight.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from mpq_fx.graph import insert_call, is_weight, value
from mpq_fx.passes.canonicalize.convolution import CONVOLUTIONS

aten = torch.ops.aten
BIASED = (aten.linear.default, *CONVOLUTIONS.values())


def merge_linear_bias(gm: GraphModule) -> int:
    found = 0
    for add in gm.graph.find_nodes(op="call_function", target=aten.add.Tensor):
        pairs = [add.args, add.args[::-1]]
        match = next((pair for pair in pairs if is_biased(*pair)), None)
        if match is None or add.kwargs:
            continue
        linear, bias = match
        args = (*linear.args[:2], bias)  # type: ignore[union-attr]
        add.replace_all_uses_with(insert_call(add, aten.linear.default, args))  # type: ignore[arg-type]
        gm.graph.erase_node(add)
        gm.graph.erase_node(linear)  # type: ignore[arg-type]
        found += 1
    return found


def split_computed_bias(gm: GraphModule) -> int:
    found = 0
    for node in list(gm.graph.nodes):
        bias = node.args[2] if node.target in BIASED and len(node.args) > 2 else None
        if not isinstance(bias, Node) or is_weight(bias):
            continue
        dims = value(node).dim() - 2
        x = insert_call(node, node.target, (*node.args[:2], None, *node.args[3:]))  # type: ignore[arg-type]
        if node.target is not aten.linear.default:
            bias = insert_call(node, aten.view.default, (bias, [-1] + [1] * dims))
        node.replace_all_uses_with(insert_call(node, aten.add.Tensor, (x, bias)))
        gm.graph.erase_node(node)
        found += 1
    return found


def is_biased(linear: object, bias: object) -> bool:
    """A linear without bias that only the sum reads, and a row of weights as wide."""
    if not isinstance(linear, Node) or not is_weight(bias):
        return False
    if linear.target is not aten.linear.default or len(linear.users) != 1:
        return False
    if len(linear.args) > 2 and linear.args[2] is not None:
        return False
    row, result = value(bias), value(linear)  # type: ignore[arg-type]
    return row.shape == result.shape[-1:] and row.dtype == result.dtype
