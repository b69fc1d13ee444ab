"""conv1d, conv2d, convolution, with defaults or padding="same"  ->  conv2d(x, w, b, [s], [p], [d], groups)

All arguments are explicit lists, so that later passes read them by position; padding that differs
at the two ends becomes a pad of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from mpq_fx.graph import insert_call, value

aten = torch.ops.aten
TARGETS = {1: aten.conv1d.default, 2: aten.conv2d.default}
NAMED_PADDING = (aten.conv1d.padding, aten.conv2d.padding)
PLAIN = (aten.conv1d.default, aten.conv2d.default, aten.convolution.default)


def canonicalize_convolution(gm: GraphModule) -> int:
    """One spelling of every forward 1-d and 2-d convolution."""
    found = 0
    for node in list(gm.graph.nodes):
        if node.target not in (*PLAIN, *NAMED_PADDING) or value(node).dim() not in (3, 4):
            continue
        args = arguments(node)
        dims = value(node).dim() - 2
        if args is None or (node.target is TARGETS[dims] and args == list(node.args)):
            continue
        conv = insert_call(node, TARGETS[dims], tuple(args))
        node.replace_all_uses_with(conv)
        gm.graph.erase_node(node)
        found += 1
    return found


def arguments(node: Node) -> list[Any] | None:
    """[x, w, b, stride, padding, dilation, groups] of any spelling; None for a transposed one."""
    dims = value(node).dim() - 2
    if node.target is aten.convolution.default:
        x, w, b, stride, padding, dilation, is_transposed, _, groups = node.args
        return None if is_transposed else [x, w, b, [*stride], [*padding], [*dilation], groups]
    defaults: list[Any] = [None, None, None, 1, 0, 1, 1]
    x, w, b, stride, padding, dilation, groups = [*node.args, *defaults[len(node.args) :]]
    stride, dilation = full(stride, dims), full(dilation, dims)
    if isinstance(padding, str):
        x, padding = padded(node, x, padding, dilation)
    return [x, w, b, stride, full(padding, dims), dilation, groups]


def full(sizes: Any, dims: int) -> list[Any]:
    """One number for all dimensions, or one each."""
    sizes = [sizes] if not isinstance(sizes, (list, tuple)) else [*sizes]
    return sizes * dims if len(sizes) == 1 else sizes


def padded(node: Node, x: Any, padding: str, dilation: list[int]) -> tuple[Any, list[int]]:
    """ "same" and "valid" as numbers; an odd total puts the extra element at the end."""
    if padding == "valid":
        return x, [0] * len(dilation)
    kernel = value(node.args[1]).shape[2:]
    totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if any(total % 2 for total in totals):
        ends = [side for total in reversed(totals) for side in (0, total % 2)]
        x = insert_call(node, aten.constant_pad_nd.default, (x, ends))
    return x, [total // 2 for total in totals]
