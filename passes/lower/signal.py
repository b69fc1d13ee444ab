"""conv1d(x[B, C, L], w[N, C, K])  ->  conv2d(x[B, C, 1, L], w[N, C, 1, K])[B, N, 0, L']

What PyTorch has of oneDNN's convolutions describes images: for a signal their fakes fail.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from mpq_fx.graph import insert_call, value

aten = torch.ops.aten
Window = tuple[Any, Any, Any]


def as_image(anchor: Node, x: Node) -> Node:
    """[B, C, L] -> [B, C, 1, L]; an image stays as it is."""
    return insert_call(anchor, aten.unsqueeze.default, (x, 2)) if value(x).dim() == 3 else x


def as_signal(anchor: Node, y: Node, x: Node) -> Node:
    """[B, N, 1, L] -> [B, N, L], where `x` was a signal."""
    return insert_call(anchor, aten.squeeze.dim, (y, 2)) if value(x).dim() == 3 else y


def image_window(stride: Any, padding: Any, dilation: Any) -> Window:
    """The same window with one row."""
    if len(stride) == 1:
        return [1, *stride], [0, *padding], [1, *dilation]
    return stride, padding, dilation
