"""mpq::linear [-> add] [-> act] [-> quantize | cast]  ->  mpq_triton::<kernel>(x, pack(w), …)

The same for every kernel of kernels/linear: it says what it refuses and how it packs a weight.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

import mpq_fx.kernels  # noqa: F401 - defines torch.ops.mpq
from mpq_fx.formats import Format, format_named
from mpq_fx.graph import arguments, insert_call, value
from mpq_fx.kernels.linear.triton_linear import LinearKernel, Shape
from mpq_fx.kernels.quantize.triton import is_packed
from mpq_fx.kernels.tile import Machine
from mpq_fx.passes.lower.fuse import Post, Tail, any_sum_tail_of, tail_of
from mpq_fx.passes.lower.kernel import Kernel

mpq, mpq_triton = torch.ops.mpq, torch.ops.mpq_triton
POSTS = frozenset({"relu", "gelu", "swish"})


def linear_kernel(kernel: LinearKernel, machine: Machine, target: str) -> Kernel:
    """A kernel of kernels/linear as a rule on graphs."""

    def refuse(node: Node) -> Iterator[str]:
        return kernel.refuse(shape_of(node, machine))

    def lower(gm: GraphModule, node: Node) -> Node:
        return lower_linear(node, kernel.name)

    def is_for(node: Node) -> bool:
        return not any(kernel.refuse_formats(*formats_of(node)))

    return Kernel(target, mpq.linear.default, refuse, lower, last, is_for)


def last(node: Node) -> Node:
    return tail_for(node).last


def tail_for(node: Node) -> Tail:
    """The sum with any residual, an activation, the next site's quantization to codes of a byte."""
    tail = any_sum_tail_of(node, POSTS) or tail_of(node, POSTS)
    if tail.quantize is None or not is_packed(format_named(arguments(tail.quantize)[-1])):
        return tail
    return replace(tail, last=arguments(tail.quantize)[0], quantize=None)


def shape_of(node: Node, machine: Machine) -> Shape:
    """What kernels decide by."""
    x, scale, _, w, *_, x_fmt, _, _ = arguments(node)
    sizes = value(x).shape[:-1]
    rows = math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None
    n, k = value(w).shape
    return Shape(*formats_of(node), rows, n, k, machine, scaling_of(x_fmt, scale))


def formats_of(node: Node) -> tuple[Format, Format]:
    """Of the activation and of the weight."""
    *_, x_fmt, w_fmt, _ = arguments(node)
    return format_named(x_fmt), format_named(w_fmt)


def scaling_of(x_fmt: str, scale: Node) -> str:
    """Is the scale of the activation a constant of the plan?"""
    if format_named(x_fmt).scale is None:
        return "none"
    return "static" if scale.op == "get_attr" else "dynamic"


def lower_linear(node: Node, name: str) -> Node:
    """The callee, before the last node that it takes over: there all operands are known."""
    x, sx, zx, w, sw, zw, bias, x_fmt, w_fmt, _ = arguments(node)
    fmt, tail = format_named(x_fmt), tail_for(node)
    anchor = tail.last
    packed = unpacked(anchor, insert_call(anchor, op(f"{name}_pack"), (w, sw, zw, w_fmt)))
    scale = None if fmt.scale is None else sx
    zero = None if fmt.scale is None or fmt.symmetric else zx
    written = quantization(tail)
    args = (
        *(x, scale, zero, packed, bias, *addend_of(tail), *written[:2]),
        *(x_fmt, w_fmt, value(w).shape[0], activation(tail.post)),
        *(value(tail.last if tail.quantize is None else node).dtype, written[2]),
    )
    return insert_call(anchor, op(name), args)


def op(name: str) -> Any:
    return getattr(mpq_triton, name).default


def unpacked(anchor: Node, found: Node) -> list[Node]:
    """The tensors of a list, each a constant of its own."""
    count = len(value(found))
    return [insert_call(anchor, operator.getitem, (found, k)) for k in range(count)]


def addend_of(tail: Tail) -> tuple[Node | None, Node | None, Node | None]:
    """(tensor, scale, zero) of what is added."""
    found = tail.addend
    return (None, None, None) if found is None else (found.x, found.scale, found.zero)


def quantization(tail: Tail) -> tuple[Node | None, Node | None, str]:
    """(scale, zero, format) of codes that are stored in place of floats."""
    if tail.quantize is None:
        return None, None, ""
    _, scale, zero, name = arguments(tail.quantize)
    return scale, zero, name


def activation(post: Post) -> str:
    """oneDNN's words in those of the device functions."""
    if post.name == "gelu":
        return "gelu_tanh" if post.algorithm == "tanh" else "gelu"
    return {"swish": "silu"}.get(post.name, post.name)
