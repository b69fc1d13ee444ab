"""mpq::quantize(x)  ->  clamp(round(x / scale) + zero).to(int8)  in ATen, for Inductor to fuse

The same arithmetic in the same order as numerics.quantize, so the codes are the same bit for bit.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

import mpq_fx.kernels  # noqa: F401 - defines torch.ops.mpq
from mpq_fx.formats import Format, format_named
from mpq_fx.graph import arguments, insert_call, value
from mpq_fx.passes.rewrite.float_op import CAST

aten, mpq = torch.ops.aten, torch.ops.mpq


def decompose_quantize(gm: GraphModule) -> int:
    """Every static and dynamic quantization of an activation."""
    found = 0
    for node in list(gm.graph.nodes):
        if node.target is mpq.quantize.default:
            x, scale, zero, name = arguments(node)
            node.replace_all_uses_with(encode_static(gm, node, x, scale, zero, name))
            found += 1
        elif node.target is mpq.quantize_dynamic.default:
            _replace_dynamic(node, *node.args)
            found += 1
    return found


def encode_static(
    gm: GraphModule, anchor: Node, x: Node, scale: Node, zero: Node, name: str
) -> Node:
    """Scale and zero point stay tensors: as numbers in the code they would keep equal layers from
    sharing one kernel.
    """
    return encode(anchor, x, scale, zero if scalar(gm, zero) else 0, format_named(name))


def encode(anchor: Node, x: Any, scale: Any, zero: Any, fmt: Format) -> Node:
    """clamp(round(float(x) / scale) + zero, qmin, qmax) in the codes' dtype

    A cast to floats rounds by itself, and saturates what was clamped before.
    """
    y = insert_call(anchor, aten.div.Tensor, (as_float(anchor, x), scale))
    if not fmt.has_float_codes:
        y = insert_call(anchor, aten.round.default, (y,))
    if isinstance(zero, Node) or zero != 0:
        y = insert_call(anchor, aten.add.Tensor, (y, zero))
    y = insert_call(anchor, aten.clamp.default, (y, fmt.qmin, fmt.qmax))
    return insert_call(anchor, CAST, (y, fmt.dtype))


def as_float(anchor: Node, x: Any) -> Node:
    return x if value(x).dtype == torch.float32 else insert_call(anchor, CAST, (x, torch.float32))


def scalar(gm: GraphModule, node: Any) -> float:
    """The value of a one-element constant: a scale fixed by calibration never changes."""
    assert node.op == "get_attr", f"{node} is not a constant of the plan"
    return getattr(gm, str(node.target)).item()


def _replace_dynamic(node: Node, x: Node, name: str) -> None:
    """Per-row scale of x itself; a row of zeros has scale 1, and no scale is subnormal."""
    fmt = format_named(name)
    assert fmt.symmetric, f"{fmt} has a zero point"
    x = as_float(node, x)
    absmax = insert_call(
        node, aten.amax.default, (insert_call(node, aten.abs.default, (x,)), [-1], True)
    )
    raw = insert_call(node, aten.div.Tensor, (absmax, float(fmt.max)))
    is_zero = insert_call(node, aten.eq.Scalar, (raw, 0))
    ones = insert_call(node, aten.ones_like.default, (raw,))
    scale = insert_call(node, aten.where.self, (is_zero, ones, raw))
    scale = insert_call(node, aten.clamp.default, (scale, torch.finfo(torch.float32).tiny))
    codes = encode(node, x, scale, 0, fmt)
    for user in list(node.users):
        assert user.target is operator.getitem, f"{user} reads a tuple whole"
        _, position = arguments(user)
        if position < 2:
            user.replace_all_uses_with((codes, scale)[position])
