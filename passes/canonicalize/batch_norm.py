"""batch_norm(conv(x, w, b))  ->  conv(x, w·s, (b − mean)·s + beta)      s = gamma / √(var + eps)

The new weight stays a value of the graph, computed in float64 from the parameters, so that a later
edit of any of them can be folded again.  What cannot be folded stays one `batch_norm`.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from mpq_fx.graph import insert_call, is_weight, value
from mpq_fx.passes.canonicalize.arguments import arguments_of

aten = torch.ops.aten
EVAL = aten._native_batch_norm_legit_no_training.default
STATISTICS = ("weight", "bias", "running_mean", "running_var")
CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)


def spell_batch_norm(gm: GraphModule) -> int:
    """_native_batch_norm_legit_no_training(x, …)[0]  ->  batch_norm(x, …, training=False)"""
    found = 0
    for node in gm.graph.find_nodes(op="call_function", target=EVAL):
        items = [*node.users]
        if any(user.target is not operator.getitem or user.args[1] != 0 for user in items):
            continue
        args = (*node.args[:5], False, *node.args[5:], False)
        norm = insert_call(node, aten.batch_norm.default, args)
        for item in items:
            item.replace_all_uses_with(norm)
            gm.graph.erase_node(item)
        gm.graph.erase_node(node)
        found += 1
    return found


def fold_batch_norm(gm: GraphModule) -> int:
    found = 0
    for norm in gm.graph.find_nodes(op="call_function", target=aten.batch_norm.default):
        facts = arguments_of(norm)
        source = facts["input"]
        if not is_foldable(source, facts):
            continue
        weight, bias = folded(norm, source, facts)
        args = (source.args[0], weight, bias, *source.args[3:])
        norm.replace_all_uses_with(insert_call(norm, source.target, args))
        gm.graph.erase_node(norm)
        gm.graph.erase_node(source)
        found += 1
    return found


def is_foldable(source: Node, facts: dict[str, Any]) -> bool:
    """A convolution, or a linear on rows, with constant weights, that only the norm reads."""
    linear = source.target is aten.linear.default and value(source).ndim == 2
    if not linear and source.target not in CONVOLUTIONS:
        return False
    if facts["training"] or facts["running_mean"] is None or len(source.users) != 1:
        return False
    operands = [*source.args[1:3], *(facts[name] for name in STATISTICS)]
    return all(is_weight(node) for node in operands if isinstance(node, Node))


def folded(norm: Node, source: Node, facts: dict[str, Any]) -> tuple[Node, Node]:
    """(weight, bias) of the convolution that does both, in the dtype of its weight."""
    gamma, beta, mean, var = (_double(norm, facts[name]) for name in STATISTICS)
    weight, bias = source.args[1], (*source.args, None)[2]
    dtype, ndim = value(weight).dtype, value(weight).ndim  # type: ignore[arg-type]
    shifted = insert_call(norm, aten.add.Tensor, (var, facts["eps"]))
    scale = insert_call(norm, aten.rsqrt.default, (shifted,))
    scale = scale if gamma is None else insert_call(norm, aten.mul.Tensor, (scale, gamma))
    column = insert_call(norm, aten.view.default, (scale, [-1] + [1] * (ndim - 1)))
    scaled = insert_call(norm, aten.mul.Tensor, (_double(norm, weight), column))
    if bias is None:
        centered = insert_call(norm, aten.neg.default, (mean,))
    else:
        centered = insert_call(norm, aten.sub.Tensor, (_double(norm, bias), mean))
    moved = insert_call(norm, aten.mul.Tensor, (centered, scale))
    moved = moved if beta is None else insert_call(norm, aten.add.Tensor, (moved, beta))
    return (
        insert_call(norm, aten.to.dtype, (scaled, dtype)),
        insert_call(norm, aten.to.dtype, (moved, dtype)),
    )


def _double(anchor: Node, node: Any) -> Any:
    return None if node is None else insert_call(anchor, aten.to.dtype, (node, torch.float64))
