"""mpq::linear, mpq::conv, float linear and conv  ->  oneDNN ops on packed constants

static     onednn.qlinear_pointwise(codes, scale, zero, pack(w), …)
           onednn.qlinear_pointwise.binary(…, residual, …), added into the residual's own codes
dynamic    onednn.qlinear_pointwise(codes, 1, 0, pack(w), …) · row scale + bias
weight     int8 or int4 weights alone, for a few rows: `weight_only`
bf16, f32  mkldnn._linear_pointwise(x, pack(w), b)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

import mpq_fx.kernels  # noqa: F401 - defines torch.ops.mpq
from mpq_fx.formats import format_named
from mpq_fx.graph import (
    SITE,
    arguments,
    erase_unread,
    insert_call,
    is_weight,
    remove_dead,
    value,
)
from mpq_fx.passes.lower import cpu, weight_only
from mpq_fx.passes.lower.fuse import (
    Addend,
    Post,
    Tail,
    float_tail_of,
    may_alias,
    only_user,
    sum_tail_of,
    tail_of,
)
from mpq_fx.passes.lower.inductor import compile_frozen, finishing, kernels_of
from mpq_fx.passes.lower.onednn_choices import CHOICES, refuse, unavailable
from mpq_fx.passes.lower.onednn_cost import convert, measure, modes
from mpq_fx.passes.lower.pointwise import as_maps, as_rows, is_pointwise
from mpq_fx.passes.lower.quantize_aten import decompose_quantize, encode_static, scalar
from mpq_fx.passes.lower.signal import as_image, as_signal, image_window
from mpq_fx.passes.lower.sums import hide_sums
from mpq_fx.passes.lower.target import Lowered, Target
from mpq_fx.passes.rewrite.float_op import CAST, cast_to

aten, mpq, onednn, mkldnn = (torch.ops.aten, torch.ops.mpq, torch.ops.onednn, torch.ops.mkldnn)

QLINEAR = "onednn.qlinear_pointwise"
FLOATS = (1.0, 0, torch.float32)  # a result without a scale of its own


def lower(gm: GraphModule, mode: str) -> Lowered:
    """Replace every site by its callee; weights stay values, to be folded into owned constants.

    In a mode with matmul templates a matmul hands over floats: the quantization behind it is fused
    by Inductor, with its scale as a tensor, so that equal layers share the code of one template.
    """
    kernels: dict[str, str] = {}
    mode = kernels_of(mode)
    for node in list(gm.graph.nodes):
        if node.target not in RULES or not is_packed(node):
            continue
        rule, find_tail, posts = RULES[node.target]
        tail = residual_tail(node, mode) or find_tail(node, posts)
        result, callee = rule(gm, node, tail, mode)
        dtype = value(tail.last).dtype
        tail.last.replace_all_uses_with(cast_to(node, result, dtype))
        erase_unread(tail.last)
        kernels |= dict.fromkeys(node.meta.get(SITE, ()), callee)
    decompose_quantize(gm)
    hide_sums(gm)
    remove_dead(gm)
    return Lowered(kernels)


def is_packed(node: Node) -> bool:
    """Has oneDNN a layout for the weight on this CPU?  For codes always; not for a weight that a
    call computes, which cannot be packed before it, nor for a vector.
    """
    if node.target in CODED:
        return True
    weight = arguments(node)[1]
    return is_weight(weight) and value(weight).dim() > 1 and cpu.packs(value(node).dtype)


def lower_linear(gm: GraphModule, node: Node, tail: Tail, mode: str) -> tuple[Node, str]:
    """Integer linear; if static, scales, bias, activation and requantization in the kernel."""
    x, sx, zx, w, sw, zw, bias, x_name, *_ = arguments(node)
    if format_named(x_name).is_plain:
        return weight_only.lower_weight_only(node)
    packed = pack(node, onednn.qlinear_prepack.default, (w, None), value(w).t())
    weight = (packed, flat(node, sw), flat(node, zw))
    if sx.op == "get_attr":
        x, zero = unsigned(node, x, int(scalar(gm, zx)), x_name)
        given = Operands(x, (scalar(gm, sx), zero), weight, owned(node, bias), tail.addend)
        return matmul(gm, node, given, tail, mode)
    y = _qlinear(gm, node, Operands(x, (1.0, 0), weight), FLOATS, Post())
    y = insert_call(node, aten.mul.Tensor, (y, sx))
    return (y if bias is None else insert_call(node, aten.add.Tensor, (y, bias))), QLINEAR


def lower_conv(gm: GraphModule, node: Node, tail: Tail, mode: str) -> tuple[Node, str]:
    """Integer convolution with static scales, activation and the next site's quantization in it."""
    (x, sx, zx, w, sw, zw, bias, stride, padding, dilation, groups, name, *_) = arguments(node)
    x, zero = unsigned(node, x, int(scalar(gm, zx)), name)
    scales = flat(node, sw)
    if is_pointwise(node) and tail.post.name in MATMUL_POSTS:
        matrix = insert_call(node, aten.reshape.default, (w, [value(w).shape[0], -1]))
        packed = pack(node, onednn.qlinear_prepack.default, (matrix, None), value(matrix).t())
        weight, pixels = (packed, scales, flat(node, zw)), as_rows(node, x, stride)
        addend = tail.addend and replace(tail.addend, x=as_rows(node, tail.addend.x, (1, 1)))
        given = Operands(pixels, (scalar(gm, sx), zero), weight, owned(node, bias), addend)
        y, callee = matmul(gm, node, given, tail, mode)
        return as_maps(node, y), callee
    image, w = as_image(node, x), as_image(node, w)
    window = (*image_window(stride, padding, dilation), groups)
    shape = [hint(size) for size in value(image).shape]
    operands = (w, scales, scalar(gm, sx), zero, *window, shape)
    packed = pack(node, onednn.qconv_prepack.default, operands, value(w))
    given = (image, scalar(gm, sx), zero, packed, scales, flat(node, zw), owned(node, bias))
    tail_args = (*output_of(gm, tail), tail.post.name, [*tail.post.scalars], "")
    y = insert_call(node, onednn.qconv_pointwise.default, (*given, *window, *tail_args))
    return as_signal(node, y, x), "onednn.qconv_pointwise"


@dataclass(frozen=True)
class Operands:
    """What an integer matmul reads: codes, their scale and zero point, (packed, scales, zeros)."""

    x: Node
    scales: tuple[float, int]
    weight: tuple[Node, Node, Node]
    bias: Any = None
    addend: Addend | None = None


def matmul(gm: GraphModule, node: Node, given: Operands, tail: Tail, mode: str) -> tuple[Node, str]:
    """Static integer matmul with what follows it: in oneDNN's op, or fused behind a template.

    A template gives float32 only; the cast or quantization behind it is part of its epilogue.  GELU
    stays with oneDNN, whose erf takes a third of the time of the template's, unless it gives
    float32, which would become a template anyway.
    """
    callee = QLINEAR if given.addend is None else f"{QLINEAR}.binary"
    is_gelu = tail.post.name == "gelu" and value(tail.last).dtype != torch.float32
    if not mode or is_gelu:
        return _qlinear(gm, node, given, output_of(gm, tail), tail.post), callee
    y = _qlinear(gm, node, given, FLOATS, tail.post)
    if tail.quantize is None:
        return cast_to(node, y, value(tail.last).dtype), callee
    _, scale, zero, name = arguments(tail.quantize)
    for constant in (scale, zero):
        node.prepend(constant)
    return encode_static(gm, node, y, scale, zero, name), callee


def residual_tail(node: Node, mode: str) -> Tail | None:
    """The sum that an integer matmul takes over.  A template leaves it to Inductor, which fuses the
    whole of it.
    """
    is_matmul = node.target is mpq.linear.default or (
        node.target is mpq.conv.default and is_pointwise(node)
    )
    if mode or not is_matmul or not is_static(node):
        return None
    tail = sum_tail_of(node, SUM_POSTS)
    if tail is None or tail.addend is None:
        return None
    return tail if tail.addend.scale is not None or can_be_read(node, tail) else None


def can_be_read(node: Node, tail: Tail) -> bool:
    """Can a sum that leaves its addend alone take it as it is?  It reads it as if it lay in memory
    like the result; and Inductor gives the result the dtype of x, unless floating (torch 2.13).
    """
    assert tail.addend is not None
    x, dtype = value(tail.addend.x), value(tail.last).dtype
    rows = x.movedim(1, -1) if node.target is mpq.conv.default else x
    return rows.is_contiguous() and (dtype.is_floating_point or dtype == torch.uint8)


def unsigned(anchor: Node, x: Node, zero: int, name: str) -> tuple[Node, int]:
    """Signed codes of fewer than 8 bits as unsigned ones around their middle.

    Given int8 operands, a CPU without VNNI shifts them by 128 and its int16 sums saturate; shifted
    by half their own range they do not.
    """
    fmt = format_named(name)
    if fmt.dtype != torch.int8 or fmt.element.bits == 8:
        return x, zero
    middle = 1 << (fmt.element.bits - 1)
    wide = insert_call(anchor, CAST, (x, torch.int32))
    shifted = insert_call(anchor, aten.add.Tensor, (wide, middle))
    return insert_call(anchor, CAST, (shifted, torch.uint8)), zero + middle


def output_of(gm: GraphModule, tail: Tail) -> tuple[float, int, torch.dtype]:
    """(scale, zero, dtype) of a kernel's result: the next site's codes, or plain floats."""
    if tail.quantize is None:
        return 1.0, 0, value(tail.last).dtype
    _, scale, zero, name = arguments(tail.quantize)
    return scalar(gm, scale), int(scalar(gm, zero)), format_named(name).dtype


def lower_embedding(gm: GraphModule, node: Node, tail: Tail, mode: str) -> tuple[Node, str]:
    """Gather codes and scales of the rows, multiply."""
    indices, w, sw, _, name, _ = arguments(node)
    assert format_named(name).symmetric, f"{name} has a zero point"
    codes = insert_call(node, aten.embedding.default, (w, indices))
    scales = insert_call(node, aten.embedding.default, (sw, indices))
    wide = insert_call(node, CAST, (codes, torch.float32))
    return insert_call(node, aten.mul.Tensor, (wide, scales)), "inductor gather"


def lower_float_linear(gm: GraphModule, node: Node, tail: Tail, mode: str) -> tuple[Node, str]:
    """float32 or bfloat16 on a packed weight."""
    x, w, *rest = arguments(node)
    bias = rest[0] if rest else None
    rows = math.prod(hint(size) for size in value(x).shape[:-1])
    packed = pack(node, mkldnn._reorder_linear_weight.default, (w, rows), value(w))
    post = (tail.post.name, [*tail.post.scalars], tail.post.algorithm)
    is_hidden = value(x).dim() == 1 or is_between_views(x, tail.last)  # a template wants rows
    x = insert_call(node, aten.unsqueeze.default, (x, 0)) if is_hidden else x
    args = (x, packed, owned(node, bias), *post)
    y = insert_call(node, mkldnn._linear_pointwise.default, args)
    y = insert_call(node, aten.squeeze.dim, (y, 0)) if is_hidden else y
    return y, "mkldnn._linear_pointwise"


def is_between_views(x: Node, last: Node) -> bool:
    """Does Inductor take reshape(linear(reshape(z)), …) for a linear that it made two-dimensional
    itself, and assert it (torch 2.13)?  One more dimension of size 1 hides it.
    """
    after = only_user(last)
    return value(x).dim() != 2 and is_view(x) and after is not None and is_view(after)


def is_view(node: Node) -> bool:
    return node.op == "call_function" and node.target is not CAST and may_alias(node)


def lower_float_conv(gm: GraphModule, node: Node, tail: Tail, mode: str) -> tuple[Node, str]:
    x, w, bias, stride, padding, dilation, groups = arguments(node)
    post = (tail.post.name, [*tail.post.scalars], tail.post.algorithm)
    if is_pointwise(node) and tail.post.name in MATMUL_POSTS:
        matrix = insert_call(node, aten.reshape.default, (w, [value(w).shape[0], -1]))
        pixels = as_rows(node, x, stride)
        rows = math.prod(hint(size) for size in value(pixels).shape[:-1])
        packed = pack(node, mkldnn._reorder_linear_weight.default, (matrix, rows), value(matrix))
        args = (pixels, packed, owned(node, bias), *post)
        y = insert_call(node, mkldnn._linear_pointwise.default, args)
        return as_maps(node, y), "mkldnn._linear_pointwise"
    image, w = as_image(node, x), as_image(node, w)
    stride, padding, dilation = image_window(stride, padding, dilation)
    shape = [hint(size) for size in value(image).shape]
    operands = (w, padding, stride, dilation, groups, shape)
    packed = pack(node, mkldnn._reorder_convolution_weight.default, operands, value(w))
    args = (image, packed, owned(node, bias), padding, stride, dilation, groups, *post)
    y = insert_call(node, mkldnn._convolution_pointwise.default, args)
    return as_signal(node, y, x), "mkldnn._convolution_pointwise"


def integer_tail(node: Node, posts: frozenset[str]) -> Tail:
    """A kernel that scales outside (dynamic, weight-only) takes nothing over."""
    return tail_of(node, posts) if is_static(node) else Tail(node)


def is_static(node: Node) -> bool:
    """Does an integer site read codes whose scale is a constant?"""
    return arguments(node)[1].op == "get_attr" and not format_named(_formats(node)[0]).is_plain


def _formats(node: Node) -> tuple[str, str]:
    names = [arg for arg in arguments(node) if isinstance(arg, str)]
    return names[0], names[1]


def as_is(node: Node, posts: frozenset[str]) -> Tail:
    return Tail(node)


LINEAR_POSTS = frozenset({"relu", "gelu", "swish"})
MATMUL_POSTS = LINEAR_POSTS | {"none"}  # of a convolution that runs as a matmul
CONV_POSTS = frozenset({"relu", "hardtanh", "swish"})
SUM_POSTS = frozenset({"relu"})
CODED = (mpq.linear.default, mpq.conv.default, mpq.embedding.default)
RULES: dict[Any, tuple[Callable[..., tuple[Node, str]], Callable[..., Tail], frozenset[str]]] = {
    mpq.linear.default: (lower_linear, integer_tail, LINEAR_POSTS),
    mpq.conv.default: (lower_conv, integer_tail, CONV_POSTS),
    mpq.embedding.default: (lower_embedding, as_is, frozenset()),
    aten.linear.default: (lower_float_linear, float_tail_of, LINEAR_POSTS),
    aten.conv1d.default: (lower_float_conv, float_tail_of, CONV_POSTS),
    aten.conv2d.default: (lower_float_conv, float_tail_of, CONV_POSTS),
}


def pack(anchor: Node, target: Any, args: tuple[Any, ...], logical: torch.Tensor) -> Node:
    """A call that packs a weight; packing has no fake, so its value is the logical weight's."""
    with anchor.graph.inserting_before(anchor):
        node = anchor.graph.call_function(target, args)
    node.meta["val"] = logical
    return node


def owned(anchor: Node, bias: Any) -> Any:
    """A constant copy of a bias: Inductor's matmul templates want all operands but x constant."""
    if not isinstance(bias, Node) or bias.op != "placeholder":
        return bias
    return insert_call(anchor, aten.clone.default, (bias,))


def hint(size: Any) -> int:
    """A size as seen so far: packing picks a blocking for it, and works for every other."""
    return size if isinstance(size, int) else size.node.hint


def flat(anchor: Node, rows: Node) -> Node:
    """[N, 1] -> [N]: oneDNN takes one scale and one zero point per output as vectors."""
    return insert_call(anchor, aten.reshape.default, (rows, [-1]))


def _qlinear(
    gm: GraphModule,
    node: Node,
    given: Operands,
    output: tuple[float, int, torch.dtype],
    post: Post,
) -> Node:
    tail = (post.name, [*post.scalars], post.algorithm)
    args = (given.x, *given.scales, *given.weight)
    if given.addend is None:
        args = (*args, given.bias, *output, *tail)
        return insert_call(node, onednn.qlinear_pointwise.default, args)
    addend = (1.0, 0, "add", 1.0)
    if given.addend.scale is not None:
        addend = (scalar(gm, given.addend.scale), int(scalar(gm, given.addend.zero)), "sum", 1.0)
    args = (*args, given.addend.x, given.bias, *output, *addend, *tail)
    return insert_call(node, onednn.qlinear_pointwise.binary, args)


ONEDNN = Target(
    "cpu",
    unavailable,
    CHOICES,
    refuse,
    measure,
    lower,
    compile_frozen,
    modes,
    finishing,
    convert,
    facts=cpu.facts,
    tensors=("cpu",),
)
