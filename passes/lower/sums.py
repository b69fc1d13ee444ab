"""linear(x) + y of integers  ->  y - (-linear(x))
linear(x) + y of floats    ->  y + linear(x)
linear(x) + linear(z)      ->  linear(x) - (-linear(z))
linear(x) + 2              ->  linear(x) - (-2)
x + 3 · y                  ->  x + (3 · y)

Hidden from Inductor's own fusions, whose sums are wrong or fail (torch 2.13).  A plus beside an
integer linear it takes over, written into y; as a template that result shares the memory of y,
which is then given away twice.  A float linear in front of a plus it takes for one with a bias to
be joined, and asserts that it packed the weight itself.  Of every sum it forgets the factor.  What
a kernel of ours may take over was taken over before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from mpq_fx.graph import arguments, insert_call

aten, onednn, mkldnn = torch.ops.aten, torch.ops.onednn, torch.ops.mkldnn


def hide_sums(gm: GraphModule) -> int:
    found = 0
    for node in list(gm.graph.find_nodes(op="call_function", target=aten.add.Tensor)):
        x, y = arguments(node)
        if "alpha" in node.kwargs:
            y = scaled(node, y, node.kwargs["alpha"])
            node.args, node.kwargs = (x, y), {}
        found += hide_sum(node, x, y)
    return found


def hide_sum(total: Node, x: Node, y: Any) -> bool:
    if is_integer(y) or (is_float(x) and (is_float(y) or not isinstance(y, Node))):
        subtract(total, x, y)
    elif is_integer(x) and isinstance(y, Node):
        subtract(total, y, x)
    elif is_float(x):
        total.args = (y, x)
    else:
        return False
    return True


def scaled(total: Node, y: Any, factor: Any) -> Any:
    return insert_call(total, aten.mul.Tensor, (y, factor)) if isinstance(y, Node) else y * factor


def subtract(total: Node, x: Node, y: Any) -> None:
    minus = insert_call(total, aten.neg.default, (y,)) if isinstance(y, Node) else -y
    total.replace_all_uses_with(insert_call(total, aten.sub.Tensor, (x, minus)))
    total.graph.erase_node(total)


def is_integer(node: Any) -> bool:
    return isinstance(node, Node) and node.target is onednn.qlinear_pointwise.default


def is_float(node: Any) -> bool:
    return isinstance(node, Node) and node.target is mkldnn._linear_pointwise.default
