"""_to_copy(x, dtype=d), type_as(x, y), to(x, device, d), …  ->  to.dtype(x, d)"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from mpq_fx.graph import insert_call, value
from mpq_fx.passes.canonicalize.arguments import arguments_of, leaves_graph

aten = torch.ops.aten
CAST = aten.to.dtype
SPELLINGS = (
    aten._to_copy.default,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten.type_as.default,
)


def spell_casts(gm: GraphModule) -> int:
    """Only what keeps device and memory format; anything else stays as it is."""
    found = 0
    for node in list(gm.graph.nodes):
        if node.target not in SPELLINGS or is_plain(node) or does_more(node):
            continue
        cast = insert_call(node, CAST, (node.args[0], value(node).dtype))
        node.replace_all_uses_with(cast)
        gm.graph.erase_node(node)
        found += 1
    return found


def is_plain(node: Node) -> bool:
    return node.target is CAST and len(node.args) == 2 and not node.kwargs


def does_more(node: Node) -> bool:
    """Does the op move or re-lay the tensor, or make a copy that can be seen outside?"""
    before, after = value(node.args[0]), value(node)  # type: ignore[arg-type]
    wanted = arguments_of(node).get("memory_format")
    if wanted not in (None, torch.preserve_format) or before.device != after.device:
        return True
    return before.dtype == after.dtype and leaves_graph(node)
