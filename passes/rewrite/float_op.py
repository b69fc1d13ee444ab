"""op(x, w, …)  ->  cast(op(cast(x, bf16), cast(w, bf16), …), float32)"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node, map_arg

from mpq_fx.facts import Choice
from mpq_fx.graph import insert_call, value

CAST = torch.ops.aten.to.dtype


def rewrite_float(node: Node, choice: Choice) -> None:
    """Compute one op in the float format of its choice; its users see the dtype they saw before."""
    dtype, before = getattr(torch, choice.weight), value(node).dtype
    args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda n: cast_to(node, n, dtype))
    lower = insert_call(node, node.target, args, kwargs)  # type: ignore[arg-type]
    node.replace_all_uses_with(insert_call(node, CAST, (lower, before)))
    node.graph.erase_node(node)


def cast_to(anchor: Node, node: Node, dtype: torch.dtype) -> Node:
    """`node` in `dtype`, cast before `anchor` where it is a float tensor of another one."""
    found: Any = value(node)
    if not isinstance(found, torch.Tensor) or not found.is_floating_point() or found.dtype == dtype:
        return node
    return insert_call(anchor, CAST, (node, dtype))
