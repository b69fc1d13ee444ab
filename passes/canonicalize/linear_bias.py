"""linear(x, w) + b  ->  linear(x, w, b)      b a weight with one number per output"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from mpq_fx.graph import insert_call, is_weight, value

aten = torch.ops.aten


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
