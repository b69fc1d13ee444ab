"""cast(view(cast(x, float32)), bf16)  ->  view(x)        x is bf16: widening and narrowing is
exact
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from mpq_fx.graph import arguments, insert_call, value
from mpq_fx.passes.lower.constants import VIEWS

CAST = torch.ops.aten.to.dtype
CLONES = frozenset({torch.ops.aten.contiguous.default, torch.ops.aten.clone.default})


def sink_casts(gm: GraphModule) -> int:
    """view(cast(x))  ->  cast(view(x)): a widening cast moves behind the views that read it."""
    found = 0
    for node in list(gm.graph.nodes):
        if node.target not in VIEWS | CLONES or not is_widening(node.args[0]):
            continue
        cast = node.args[0]
        moved = insert_call(node, node.target, (cast.args[0], *node.args[1:]), dict(node.kwargs))
        node.replace_all_uses_with(insert_call(node, CAST, (moved, cast.args[1])))
        gm.graph.erase_node(node)
        found += 1
    return found


def cancel_casts(gm: GraphModule) -> int:
    """cast(cast(x, wide), dtype of x)  ->  x"""
    found = 0
    for node in list(gm.graph.nodes):
        if node.target is CAST and is_widening(node.args[0]):
            original = node.args[0].args[0]
            if value(original).dtype == node.args[1]:
                node.replace_all_uses_with(original)
                gm.graph.erase_node(node)
                found += 1
    return found


def is_widening(node: object) -> bool:
    """A cast from a 16-bit float to float32."""
    if not isinstance(node, Node) or node.target is not CAST or len(node.args) != 2:
        return False
    source, dtype = arguments(node)
    return dtype == torch.float32 and value(source).dtype in (
        torch.bfloat16,
        torch.float16,
    )
