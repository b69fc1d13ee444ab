"""batch_norm(conv(x, w, b), γ, β, μ, σ²)  ->  conv(x, w · s, (b − μ) · s + β)    s = γ / √(σ² + ε)

In eval, after a convolution or linear that nobody else reads.  The fold is float64 arithmetic in the
graph, so a later edit of γ or of the running statistics reaches the folded weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from mpq_fx.graph import insert_call, is_weight, value

aten = torch.ops.aten
FOLDABLE = (aten.conv1d.default, aten.conv2d.default, aten.linear.default)


def fold_batch_norm(gm: GraphModule) -> int:
    """Every foldable batch norm into the weight and bias in front of it."""
    found = 0
    for node in list(gm.graph.nodes):
        if node.target is not aten.batch_norm.default or not is_foldable(node):
            continue
        producer = node.args[0]
        w, b = folded(node, producer)
        args = (producer.args[0], w, b, *producer.args[3:])
        node.replace_all_uses_with(insert_call(node, producer.target, args))
        gm.graph.erase_node(node)
        found += 1
    return found


def is_foldable(node: Node) -> bool:
    producer, gamma, beta, mean, var, is_training = node.args[:6]
    statistics = [n for n in (gamma, beta, mean, var) if n is not None]
    return (
        not is_training
        and isinstance(producer, Node)
        and producer.target in FOLDABLE
        and len(producer.users) == 1
        and mean is not None
        and var is not None
        and is_weight(producer.args[1])
        and all(map(is_weight, statistics))
        and (producer.target is not aten.linear.default or value(producer).dim() == 2)
    )


def folded(node: Node, producer: Node) -> tuple[Node, Node]:
    """(weight, bias) with the normalization in them, in the dtype of the weight."""
    gamma, beta, mean, var = node.args[1:5]
    eps, w = node.args[7], producer.args[1]
    bias = producer.args[2] if len(producer.args) > 2 else None
    dtype = value(w).dtype

    def call(target: Any, *args: Any) -> Node:
        return insert_call(node, target, args)

    def wide(n: Any) -> Node:
        return call(aten.to.dtype, n, torch.float64)

    scale = call(aten.rsqrt.default, call(aten.add.Tensor, wide(var), eps))
    scale = scale if gamma is None else call(aten.mul.Tensor, scale, wide(gamma))
    column = call(aten.view.default, scale, [-1] + [1] * (value(w).dim() - 1))
    weight = call(aten.to.dtype, call(aten.mul.Tensor, wide(w), column), dtype)
    shift = (
        call(aten.neg.default, wide(mean))
        if bias is None
        else call(aten.sub.Tensor, wide(bias), wide(mean))
    )
    shift = call(aten.mul.Tensor, shift, scale)
    shift = shift if beta is None else call(aten.add.Tensor, shift, wide(beta))
    return weight, call(aten.to.dtype, shift, dtype)
