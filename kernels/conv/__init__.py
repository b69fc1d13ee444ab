"""y[b, o, p] = sx · sw[o] · Σ_{c, r} (x[b, c, q] - zx) · (w[o, c, r] - zw[o]) + bias[o]

q = stride·p + dilation·r - padding; c runs over the channels of o's group.  1d, 2d or 3d by the
rank of w, always with a batch dimension.  Padding is 0 in values, that is zx in codes.  The sum of
products of codes is a float64 one, as that of mpq::linear; it is rounded to float32, scaled by sx
and then by sw in float32, the bias is added, and the result cast to `out_dtype`.  Scales of groups
along K = [c, r] stay in the sum.  x has one scale, or a plain float `x_fmt` (weight-only: x is cast
to it and has no scale, an empty tensor).

Every plain float and every scale has its exact derivative; codes carry none (straight-through
estimators belong to training).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mpq_fx.errors import UnsupportedError
from mpq_fx.formats import TENSOR, Format, format_named
from mpq_fx.kernels.operand import gradients, summand, values
from mpq_fx.numerics import weight_rows


@torch.library.custom_op("mpq::conv", mutates_args=())
def conv(  # noqa: PLR0913 - the schema of an op
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    w: Tensor,
    w_scale: Tensor,
    w_zero: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    x_fmt: str,
    w_fmt: str,
    out_dtype: torch.dtype,
) -> Tensor:
    left, sx = summand(x, x_scale, x_zero, activation(x_fmt))
    right, sw = summand(weight_rows(w), w_scale, w_zero, format_named(w_fmt))
    window = (stride, padding, dilation, False, [0] * len(stride), groups)
    y = torch.ops.aten.convolution(left, right.view(w.shape), None, *window)
    y = y.float() * sx * per_channel(sw, w)
    if bias is not None:
        y = y + per_channel(bias.float(), w)
    return y.to(out_dtype).contiguous()


@conv.register_fake
def _(  # noqa: PLR0913 - the schema of an op
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    w: Tensor,
    w_scale: Tensor,
    w_zero: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    x_fmt: str,
    w_fmt: str,
    out_dtype: torch.dtype,
) -> Tensor:
    activation(x_fmt)
    fits = x.ndim == w.ndim and x.shape[1] == w.shape[1] * groups
    torch._check(fits, lambda: f"{x.shape} by {w.shape} in {groups} groups")
    sizes = [
        (n + 2 * pad - gap * (k - 1) - 1) // step + 1
        for n, k, step, pad, gap in zip(
            x.shape[2:], w.shape[2:], stride, padding, dilation, strict=True
        )
    ]
    return x.new_empty((x.shape[0], w.shape[0], *sizes), dtype=out_dtype)


def activation(name: str) -> Format:
    """The format of x: the window crosses rows, so that only one scale leaves its sum."""
    fmt = format_named(name)
    if not fmt.is_plain and fmt.block != TENSOR:
        raise UnsupportedError(
            f"mpq::conv needs one scale for its input, but {fmt} has more",
            fix="use a format with one scale for the tensor, such as uint8_tensor",
        )
    return fmt


def per_channel(values: Tensor, w: Tensor) -> Tensor:
    """[O], [O, 1] or one value -> something that broadcasts against [B, O, …]"""
    return values.reshape(-1, *[1] * (w.ndim - 2))


def remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, bias, stride, padding, dilation, groups, ctx.x_fmt, ctx.w_fmt, _ = inputs
    ctx.bias = None if bias is None else bias.dtype
    ctx.window = (stride, padding, dilation, False, [0] * len(stride), groups)
    ctx.save_for_backward(*tensors)


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, x_scale, x_zero, w, w_scale, w_zero = ctx.saved_tensors
    fx, fw = format_named(ctx.x_fmt), format_named(ctx.w_fmt)
    rows = weight_rows(w)
    by_x, by_w, by_bias = torch.ops.aten.convolution_backward(
        grad.double(),
        values(x, x_scale, x_zero, fx),
        values(rows, w_scale, w_zero, fw).view(w.shape),
        [w.shape[0]],
        *ctx.window,
        [True, True, True],
    )
    dx, dx_scale = gradients(by_x, x, x_scale, x_zero, fx)
    dw, dw_scale = gradients(weight_rows(by_w), rows, w_scale, w_zero, fw)
    dw = None if dw is None else dw.view(w.shape)
    dbias = None if ctx.bias is None else by_bias.to(ctx.bias)
    return dx, dx_scale, None, dw, dw_scale, None, dbias, *[None] * 7


conv.register_autograd(backward, setup_context=remember)
