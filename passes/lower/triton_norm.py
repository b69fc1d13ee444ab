"""A norm over the last dimension, in one op or as models spell it

layer_norm(x, [K], w, b, eps)
rms_norm(x, [K], w, eps)
w · cast(x' · rsqrt(mean(x'²) + eps))    x' = cast(x, float32), casts where x is of 16 bits
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from mpq_fx.graph import arguments, value
from mpq_fx.passes.rewrite.float_op import CAST

aten = torch.ops.aten


@dataclass(frozen=True)
class Norm:
    """(x - mean) / √(variance + eps) · weight + bias; not centered: without mean and bias"""

    x: Node
    weight: Node | None
    bias: Node | None
    eps: float
    is_centered: bool


def norm_of(node: Node) -> Norm | None:
    given: tuple[Any, ...]
    if node.target is aten.layer_norm.default:
        x, shape, *rest = arguments(node)
        given = (*rest, *(None, None, 1e-5)[len(rest) :])
        weight, bias, eps = given[:3]
        return _last(Norm(x, weight, bias, float(eps), True), shape)
    if node.target is aten.rms_norm.default:
        given = (*arguments(node), None, None)
        x, shape, weight, eps = given[:4]
        eps = torch.finfo(value(x).dtype).eps if eps is None else eps
        return _last(Norm(x, weight, None, float(eps), False), shape)
    return _spelled_out(node)


def _last(norm: Norm, shape: Any) -> Norm | None:
    """Over the last dimension alone."""
    return norm if len(shape) == 1 else None


def _spelled_out(node: Node) -> Norm | None:
    """weight · cast(x · rsqrt(mean(x²) + eps))"""
    for weight, scaled in _factors(node):
        for x, root in _factors(uncast(scaled)):
            eps = _epsilon(root, x)
            is_vector = eps is not None and value(weight).shape == value(node).shape[-1:]
            if eps is not None and is_vector:
                return Norm(uncast(x), weight, None, eps, False)
    return None


def _factors(node: Any) -> tuple[tuple[Any, Any], ...]:
    """Both orders of a product of two tensors."""
    if not isinstance(node, Node) or node.target is not aten.mul.Tensor:
        return ()
    x, y = arguments(node)
    return ((x, y), (y, x)) if isinstance(x, Node) and isinstance(y, Node) else ()


def _epsilon(root: Any, x: Node) -> float | None:
    """eps of rsqrt(mean(x²) + eps), or None for any other node."""
    if not isinstance(root, Node) or root.target is not aten.rsqrt.default:
        return None
    total = arguments(root)[0]
    if total.target is not aten.add.Tensor or total.kwargs:
        return None
    mean, eps = arguments(total)
    if not isinstance(mean, Node) or mean.target is not aten.mean.dim:
        return None
    square, *over = arguments(mean)
    is_of_last = over[:2] == [[-1], True] and not mean.kwargs and isinstance(eps, float)
    return eps if is_of_last and _is_square(square, x) else None


def _is_square(node: Node, x: Node) -> bool:
    if node.target is aten.pow.Tensor_Scalar:
        return node.args == (x, 2)
    return node.target is aten.mul.Tensor and node.args == (x, x)


def uncast(node: Any) -> Any:
    """What a node was cast from."""
    return node.args[0] if isinstance(node, Node) and node.target is CAST else node
