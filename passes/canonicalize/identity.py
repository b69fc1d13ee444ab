"""dropout(x) in eval, detach(x), alias(x), to(x) of its own dtype, contiguous(x) of a contiguous x  ->  x"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from mpq_fx.graph import value

aten = torch.ops.aten


def remove_identities(gm: GraphModule) -> int:
    """Calls that return their input; an output of the graph keeps its own node."""
    found = 0
    for node in list(gm.graph.nodes):
        rule = IDENTITIES.get(node.target)
        if rule is None or not rule(node) or any(user.op == "output" for user in node.users):
            continue
        node.replace_all_uses_with(node.args[0])
        gm.graph.erase_node(node)
        found += 1
    return found


def is_eval_dropout(node: Node) -> bool:
    return node.args[2] is False or node.args[1] == 0


def keeps_dtype(node: Node) -> bool:
    """to(x, dtype) without a change of dtype, device, layout or an asked-for copy."""
    if len(node.args) > 3 or node.kwargs:
        return False
    return value(node.args[0]).dtype == node.args[1]


def is_contiguous(node: Node) -> bool:
    return not node.kwargs and len(node.args) == 1 and bool(value(node.args[0]).is_contiguous())


def always(node: Node) -> bool:
    return True


IDENTITIES: dict[Any, Callable[[Node], bool]] = {
    aten.dropout.default: is_eval_dropout,
    aten.feature_dropout.default: is_eval_dropout,
    aten.alpha_dropout.default: is_eval_dropout,
    aten.detach.default: always,
    aten.alias.default: always,
    aten.to.dtype: keeps_dtype,
    aten.contiguous.default: is_contiguous,
}
