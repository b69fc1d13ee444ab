"""matmul(w, xᵀ)  ->  linear(x, w)ᵀ      w a weight, as in Mamba's dt_proj

Only where the activation is a transpose already: otherwise a copy of it would be the price.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from mpq_fx.graph import insert_call, is_weight, value

aten = torch.ops.aten


def spell_left_linear(gm: GraphModule) -> int:
    found = 0
    for node in gm.graph.find_nodes(op="call_function", target=aten.matmul.default):
        w, y = node.args
        if not is_weight(w) or value(w).ndim != 2 or not is_transpose(y):
            continue
        linear = insert_call(node, aten.linear.default, (y.args[0], w))
        node.replace_all_uses_with(insert_call(node, aten.transpose.int, (linear, -1, -2)))
        gm.graph.erase_node(node)
        found += 1
    return found


def is_transpose(node: Node) -> bool:
    """A swap of the last two dimensions of something that is no weight."""
    if is_weight(node) or node.target is not aten.transpose.int:
        return False
    rank = value(node).ndim
    dims = sorted(int(dim) % rank for dim in node.args[1:])  # type: ignore[arg-type]
    return dims == [rank - 2, rank - 1]
