"""y[m, n] = sx[m] · sw[n] · Σ_k (x[m, k] - zx[m]) · (w[n, k] - zw[n]) + bias[n]

The sum of products of codes is a float64 one: exact for integers, and for e4m3 up to K = 2^17.  It
is rounded to float32, scaled by sx and then by sw in float32, the bias is added, the result cast to
`out_dtype`.  Scales of groups stay in the sum, which is then a float64 sum of scaled products.
A plain float `x_fmt` means weight-only: x is cast to it and has no scale (an empty tensor).

Every plain float and every scale has its exact derivative; codes carry none (straight-through
estimators belong to training).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mpq_fx.formats import format_named
from mpq_fx.kernels.operand import gradients, summand, values


@torch.library.custom_op("mpq::linear", mutates_args=())
def linear(  # noqa: PLR0913 - the schema of an op
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    w: Tensor,
    w_scale: Tensor,
    w_zero: Tensor,
    bias: Tensor | None,
    x_fmt: str,
    w_fmt: str,
    out_dtype: torch.dtype,
) -> Tensor:
    left, sx = summand(x, x_scale, x_zero, format_named(x_fmt))
    right, sw = summand(w, w_scale, w_zero, format_named(w_fmt))
    y = (left @ right.T).float() * sx * sw.reshape(-1)
    if bias is not None:
        y = y + bias.float()
    return y.to(out_dtype).contiguous()


@linear.register_fake
def _(  # noqa: PLR0913 - the schema of an op
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    w: Tensor,
    w_scale: Tensor,
    w_zero: Tensor,
    bias: Tensor | None,
    x_fmt: str,
    w_fmt: str,
    out_dtype: torch.dtype,
) -> Tensor:
    torch._check(w.ndim == 2 and x.shape[-1] == w.shape[1], lambda: f"{x.shape} by {w.shape}")
    return x.new_empty((*x.shape[:-1], w.shape[0]), dtype=out_dtype)


def remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.bias, ctx.x_fmt, ctx.w_fmt, _ = inputs
    ctx.bias = None if ctx.bias is None else ctx.bias.dtype
    ctx.save_for_backward(*tensors)


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, x_scale, x_zero, w, w_scale, w_zero = ctx.saved_tensors
    fx, fw = format_named(ctx.x_fmt), format_named(ctx.w_fmt)
    grad = grad.double()
    rows = grad.reshape(-1, w.shape[0])
    by_x = grad @ values(w, w_scale, w_zero, fw)
    by_w = rows.T @ values(x, x_scale, x_zero, fx).reshape(-1, w.shape[1])
    dx, dx_scale = gradients(by_x, x, x_scale, x_zero, fx)
    dw, dw_scale = gradients(by_w, w, w_scale, w_zero, fw)
    dbias = None if ctx.bias is None else rows.sum(0).to(ctx.bias)
    return dx, dx_scale, None, dw, dw_scale, None, dbias, None, None, None


linear.register_autograd(backward, setup_context=remember)
