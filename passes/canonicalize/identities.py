"""alias(x), detach(x), clone(x), contiguous(x), to(x, same dtype), view(x, same sizes)  ->  x"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from mpq_fx.graph import value
from mpq_fx.passes.canonicalize.arguments import leaves_graph, same_sizes

aten = torch.ops.aten


def remove_identities(gm: GraphModule) -> int:
    """Only inside the graph: a returned copy must stay a copy."""
    found = 0
    for node in list(gm.graph.nodes):
        is_identity = IDENTITIES.get(node.target)
        if is_identity is None or leaves_graph(node) or not is_identity(node):
            continue
        node.replace_all_uses_with(node.args[0])
        gm.graph.erase_node(node)
        found += 1
    return found


def always(node: Node) -> bool:
    return True


def same_layout(node: Node) -> bool:
    """clone and contiguous: the copy has the strides of the original."""
    return same_sizes(value(node).stride(), _before(node).stride())


def same_dtype(node: Node) -> bool:
    plain = len(node.args) == 2 and not node.kwargs
    return plain and value(node).dtype == _before(node).dtype


def same_shape(node: Node) -> bool:
    return same_sizes(value(node).shape, _before(node).shape) and same_layout(node)


def _before(node: Node) -> Any:
    return value(node.args[0])  # type: ignore[arg-type]


IDENTITIES: dict[Any, Callable[[Node], bool]] = {
    aten.alias.default: always,
    aten.detach.default: always,
    aten.lift_fresh_copy.default: always,  # a constant of the graph: nobody writes to it any more
    aten.clone.default: same_layout,
    aten.contiguous.default: same_layout,
    aten.to.dtype: same_dtype,
    aten.view.default: same_shape,
    aten._unsafe_view.default: same_shape,
    aten.reshape.default: same_shape,
    aten.expand.default: same_shape,
}
