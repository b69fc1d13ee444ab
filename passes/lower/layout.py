"""y  ->  y in the memory layout that the user's graph gives it, where y is an output

A kernel may hand over channels_last where the float graph has another order.  Inside of a graph
nobody sees that; a caller does, whose `view` of the result fails.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from mpq_fx.graph import arguments, insert_call, output_of, value
from mpq_fx.passes.canonicalize.convolution import CONVOLUTIONS as BY_RANK

aten = torch.ops.aten
CONVOLUTIONS = (
    *BY_RANK.values(),
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
)


def keep_output_layout(gm: GraphModule, like: GraphModule) -> int:
    """Outputs of `gm` get the order of dimensions that the same output of `like` has.

    Only convolutions change one.  What their kernels hand over is seen when the graph is compiled,
    not here, where values behind them are those of the float graph: no copy is made of what lies
    in order already.
    """
    if not any(node.target in CONVOLUTIONS for node in like.graph.nodes):
        return 0
    output, wanted = output_of(gm), arguments(output_of(like))[0]
    results, found = [*arguments(output)[0]], 0
    for k, (node, original) in enumerate(zip(results, wanted, strict=True)):
        is_map = (
            isinstance(node, Node) and isinstance(value(node), Tensor) and value(node).dim() > 2
        )
        order = order_of(value(original)) if is_map else None
        if order is not None:
            results[k] = in_order(output, node, order)
            found += 1
    output.args = (type(arguments(output)[0])(results),)
    return found


def order_of(x: Tensor) -> tuple[int, ...] | None:
    """Dimensions larger than 1 from the longest step to the shortest; None if memory has gaps."""
    sizes, strides = ([_seen(n) for n in given] for given in (x.shape, x.stride()))
    order = sorted((d for d, n in enumerate(sizes) if n > 1), key=lambda d: -strides[d])
    step = 1
    for d in reversed(order):
        if strides[d] != step:
            return None
        step *= sizes[d]
    return tuple(order)


def in_order(anchor: Node, node: Node, order: tuple[int, ...]) -> Node:
    """The same numbers, with this order of dimensions in memory."""
    rank = value(node).dim()
    dims = [*order, *(d for d in range(rank) if d not in order)]
    turned = insert_call(anchor, aten.permute.default, (node, dims))
    dense = insert_call(anchor, aten.contiguous.default, (turned,))
    return insert_call(anchor, aten.permute.default, (dense, [dims.index(d) for d in range(rank)]))


def _seen(size: Any) -> int:
    """A symbol at the size it was made at, so that no guard is asked for."""
    return size if isinstance(size, int) else int(size.node.hint or 1)
