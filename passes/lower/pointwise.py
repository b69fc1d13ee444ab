"""conv(x, w[N, K, 1, 1])  ->  maps(linear(rows(x), w[N, K])): a 1x1 convolution multiplies pixels

rows and maps are views of a tensor in channels_last.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.fx import Node

import mpq_fx.kernels  # noqa: F401 - defines torch.ops.mpq
from mpq_fx.graph import arguments, insert_call, value

aten, mpq = torch.ops.aten, torch.ops.mpq


def is_pointwise(node: Node) -> bool:
    """A 1x1 convolution is a matmul over pixels, which costs less to call."""
    weight = value(window(node)[1])
    *_, padding, _, groups = window(node)
    is_matmul = weight.dim() == 4 and tuple(weight.shape[2:]) == (1, 1) and groups == 1
    return is_matmul and not any(padding)


def window(node: Node) -> tuple[Any, ...]:
    """(x, w, b, stride, padding, dilation, groups) of a float or an integer convolution."""
    args = arguments(node)
    return (args[0], args[3], *args[6:11]) if node.target is mpq.conv.default else args[:7]


def as_rows(anchor: Node, x: Node, stride: Any) -> Node:
    """[B, C, H, W] -> [B, H', W', C], every stride-th pixel: a view in channels_last."""
    for dim, step in zip((2, 3), stride, strict=True):
        if step > 1:
            args = (x, dim, 0, sys.maxsize, step)
            x = insert_call(anchor, aten.slice.Tensor, args)
    return insert_call(anchor, aten.permute.default, (x, [0, 2, 3, 1]))


def as_maps(anchor: Node, y: Node) -> Node:
    """[B, H, W, C] -> [B, C, H, W], in channels_last"""
    return insert_call(anchor, aten.permute.default, (y, [0, 3, 1, 2]))
