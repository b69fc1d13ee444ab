"""mpq::linear, mpq::conv, float linear and conv  ->  oneDNN ops on packed constants; the rest by Inductor

static     onednn.qlinear_pointwise(codes, scale, zero, pack(w), …)
dynamic    onednn.qlinear_pointwise(codes, 1, 0, pack(w), …) · row scale + bias
weight     linear(x, dequantize(w))  where M is large, the packed weight-only op where M = 1
bf16, f32  mkldnn._linear_pointwise(x, pack(w), b)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node

import mpq_fx.kernels  # noqa: F401 - defines torch.ops.mpq
from mpq_fx.facts import Choice, Site
from mpq_fx.formats import format_named
from mpq_fx.graph import SITE, insert_call, remove_dead, value
from mpq_fx.passes.lower import cpu
from mpq_fx.passes.lower.fuse import Tail, tail_of
from mpq_fx.passes.lower.inductor import compile_frozen
from mpq_fx.passes.lower.onednn_cost import measure
from mpq_fx.passes.lower.quantize_aten import decompose_quantize, scalar
from mpq_fx.passes.lower.target import Kernels, Target
from mpq_fx.passes.rewrite.float_op import CAST, cast_to

aten, mpq, onednn, mkldnn = (torch.ops.aten, torch.ops.mpq, torch.ops.onednn, torch.ops.mkldnn)

BF16 = Choice("bfloat16", "bfloat16")
STATIC = Choice("int8", "uint8_tensor", "static")
STATIC7 = Choice("int8", "int7_tensor", "static")
DYNAMIC = Choice("int8", "int8", "dynamic")
WEIGHT = Choice("int8", "bfloat16")
WEIGHT4 = Choice("int4_g32", "bfloat16")

CHOICES = {
    "linear": (BF16, STATIC, DYNAMIC, STATIC7),
    "conv": (BF16, STATIC, STATIC7),
    "embedding": (BF16, Choice("int8", "float32")),
    "matmul": (BF16,),
    "attention": (BF16,),
    "grouped_matmul": (BF16,),
}


INLINED = 8  # Inductor writes vectors up to this size into its code, where no refresh reaches


def unavailable() -> str:
    return "" if torch.backends.mkldnn.is_available() else "this build of PyTorch has no oneDNN"


def refuse(site: Site, choice: Choice) -> Iterator[str]:
    """Why a choice cannot run, or cannot run exactly, on this CPU."""
    if site.dtype not in ("float32", "bfloat16"):
        yield f"a site in {site.dtype} stays as it is"
    if site.weight_shape and site.weight_shape[0] <= INLINED:
        yield f"{site.weight_shape[0]} outputs are too few to gain, and too few to refresh in place"
    integer = choice.scaling != "none"
    if integer and not cpu.has("vnni") and choice.activation != "int7_tensor":
        yield "int8 × int8 saturates silently on a CPU without VNNI; int7 activations do not"
    if choice.activation == "int7_tensor" and cpu.has("vnni"):
        yield "this CPU multiplies int8 exactly, so 7-bit codes only lose accuracy"
    if choice.weight == "bfloat16" and not cpu.has("avx512"):
        yield "bfloat16 is emulated on a CPU without AVX-512"


def lower(gm: GraphModule) -> Kernels:
    """Replace every site by its callee; weights stay values, to be folded into owned constants."""
    kernels: Kernels = {}
    for node in list(gm.graph.nodes):
        rule = RULES.get(node.target)
        if rule is not None:
            tail = tail_of(node) if node.target in FUSING else Tail(last=node)
            result, callee = rule(gm, node, tail) if node.target in FUSING else rule(gm, node)
            tail.last.replace_all_uses_with(result)
            erase_chain(tail.last, node)
            kernels |= dict.fromkeys(node.meta.get(SITE, ()), callee)
    decompose_quantize(gm)
    remove_dead(gm)
    return kernels


def lower_linear(gm: GraphModule, node: Node) -> tuple[Node, str]:
    """Integer linear: the sum of products by oneDNN, scales in it or behind it."""
    x, sx, zx, w, sw, zw, bias, x_name, w_name, dtype = node.args
    if format_named(x_name).is_float:
        return _weight_only(node, x, w, sw, zw, bias, w_name, dtype)
    packed = pack(node, onednn.qlinear_prepack.default, (w, None), value(w).t())
    sw = insert_call(node, aten.reshape.default, (sw, [-1]))
    zw = insert_call(node, aten.reshape.default, (zw, [-1]))
    if sx.op == "get_attr":
        zero = int(scalar(gm, zx))
        y = _qlinear(node, x, scalar(gm, sx), zero, packed, sw, zw, owned(node, bias), dtype)
        return y, "onednn.qlinear_pointwise"
    y = _qlinear(node, x, 1.0, 0, packed, sw, zw, None, torch.float32)
    y = insert_call(node, aten.mul.Tensor, (y, sx))
    if bias is not None:
        y = insert_call(node, aten.add.Tensor, (y, bias))
    return cast_to(node, y, dtype), "onednn.qlinear_pointwise"


def lower_conv(gm: GraphModule, node: Node, tail: Tail) -> tuple[Node, str]:
    """Integer convolution with static scales, activation and the next site's quantization in it."""
    (x, sx, zx, w, sw, zw, bias, stride, padding, dilation, groups, _, _, dtype) = node.args
    scale, zero, out_scale, out_zero = scalar(gm, sx), int(scalar(gm, zx)), 1.0, 0
    if tail.quantize is not None:
        _, so, zo, name = tail.quantize.args
        out_scale, out_zero, dtype = scalar(gm, so), int(scalar(gm, zo)), format_named(name).dtype
    sw = insert_call(node, aten.reshape.default, (sw, [-1]))
    zw = insert_call(node, aten.reshape.default, (zw, [-1]))
    shape = [hint(size) for size in value(x).shape]
    packed = pack(
        node,
        onednn.qconv_prepack.default,
        (w, sw, scale, zero, stride, padding, dilation, groups, shape),
        value(w),
    )
    y = insert_call(
        node,
        onednn.qconv_pointwise.default,
        (
            x,
            scale,
            zero,
            packed,
            sw,
            zw,
            owned(node, bias),
            stride,
            padding,
            dilation,
            groups,
            out_scale,
            out_zero,
            dtype,
            tail.post,
            [*tail.scalars],
            "",
        ),
    )
    return y, "onednn.qconv_pointwise"


def lower_embedding(gm: GraphModule, node: Node) -> tuple[Node, str]:
    """Gather codes and scales of the rows, multiply."""
    indices, w, sw, _, name, dtype = node.args
    assert format_named(name).symmetric
    codes = insert_call(node, aten.embedding.default, (w, indices))
    scales = insert_call(node, aten.embedding.default, (sw, indices))
    y = insert_call(
        node, aten.mul.Tensor, (insert_call(node, CAST, (codes, torch.float32)), scales)
    )
    return cast_to(node, y, dtype), "inductor gather"


def lower_float_linear(gm: GraphModule, node: Node) -> tuple[Node, str]:
    """float32 or bfloat16 on a packed weight."""
    x, w, bias = (*node.args, None)[:3]
    if value(w).shape[0] <= INLINED or value(x).dtype != value(w).dtype:
        return insert_call(node, node.target, node.args), "inductor"
    rows = math.prod(hint(size) for size in value(x).shape[:-1])
    packed = pack(node, mkldnn._reorder_linear_weight.default, (w, rows), value(w))
    y = insert_call(
        node, mkldnn._linear_pointwise.default, (x, packed, owned(node, bias), "none", [], "")
    )
    return y, "mkldnn._linear_pointwise"


def lower_float_conv(gm: GraphModule, node: Node) -> tuple[Node, str]:
    x, w, bias, stride, padding, dilation, groups = node.args
    shape = [hint(size) for size in value(x).shape]
    packed = pack(
        node,
        mkldnn._reorder_convolution_weight.default,
        (w, padding, stride, dilation, groups, shape),
        value(w),
    )
    y = insert_call(
        node,
        mkldnn._convolution_pointwise.default,
        (x, packed, owned(node, bias), padding, stride, dilation, groups, "none", [], ""),
    )
    return y, "mkldnn._convolution_pointwise"


FUSING = (mpq.conv.default,)  # callees that take over what follows them
RULES: dict[Any, Callable[..., tuple[Node, str]]] = {
    mpq.linear.default: lower_linear,
    mpq.conv.default: lower_conv,
    mpq.embedding.default: lower_embedding,
    aten.linear.default: lower_float_linear,
    aten.conv2d.default: lower_float_conv,
}


def erase_chain(last: Node, first: Node) -> None:
    """Remove nodes from `last` back to `first`, each read by the next alone."""
    node = last
    while node is not first:
        before = node.args[0]
        node.graph.erase_node(node)
        node = before
    first.graph.erase_node(first)


def pack(anchor: Node, target: Any, args: tuple[Any, ...], logical: torch.Tensor) -> Node:
    """A call that packs a weight; packing has no fake, so its value is that of the logical weight."""
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


def _qlinear(
    node: Node,
    x: Any,
    scale: float,
    zero: int,
    packed: Node,
    sw: Node,
    zw: Node,
    bias: Any,
    dtype: torch.dtype,
) -> Node:
    return insert_call(
        node,
        onednn.qlinear_pointwise.default,
        (x, scale, zero, packed, sw, zw, bias, 1.0, 0, dtype, "none", [], "none"),
    )


def _weight_only(
    node: Node, x: Any, w: Node, sw: Node, zw: Node, bias: Any, name: str, dtype: torch.dtype
) -> tuple[Node, str]:
    """x · (codes · scale): the weight is widened on every call, which pays where memory binds."""
    codes = insert_call(node, CAST, (w, torch.float32))
    wide = cast_to(node, insert_call(node, aten.mul.Tensor, (codes, sw)), value(x).dtype)
    if bias is not None:
        bias = cast_to(node, bias, value(x).dtype)
    y = insert_call(node, aten.linear.default, (x, wide, bias))
    return cast_to(node, y, dtype), "aten.linear on a widened weight"


ONEDNN = Target(
    "cpu", unavailable, CHOICES, refuse, measure, lower, compile_frozen, facts=cpu.facts
)
