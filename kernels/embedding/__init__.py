"""y[…, d] = (w[i, d] - zw[i]) · sw[i],   i = indices[…]

In float32, then cast to `out_dtype`.  The scale of a row, or those of its groups, go with it.
A plain float w and every scale have their exact derivative; codes carry none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mpq_fx.formats import TENSOR, Format, format_named
from mpq_fx.kernels.operand import gradients
from mpq_fx.numerics import Quantized, dequantize


@torch.library.custom_op("mpq::embedding", mutates_args=())
def embedding(
    indices: Tensor,
    w: Tensor,
    w_scale: Tensor,
    w_zero: Tensor,
    w_fmt: str,
    out_dtype: torch.dtype,
) -> Tensor:
    fmt = format_named(w_fmt)
    y = dequantize(Quantized(*rows_of(indices, w, w_scale, w_zero, fmt=fmt)), fmt)
    return y.to(out_dtype).view(*indices.shape, w.shape[1])


@embedding.register_fake
def _(
    indices: Tensor,
    w: Tensor,
    w_scale: Tensor,
    w_zero: Tensor,
    w_fmt: str,
    out_dtype: torch.dtype,
) -> Tensor:
    return w.new_empty((*indices.shape, w.shape[1]), dtype=out_dtype)


def rows_of(
    indices: Tensor, w: Tensor, scale: Tensor, zero: Tensor, *, fmt: Format
) -> tuple[Tensor, Tensor, Tensor]:
    """The codes, scales and zero points of the rows looked up; index_select refuses bad indices."""
    picked = indices.reshape(-1)
    codes = w.index_select(0, picked)
    if fmt.is_plain:
        return codes.to(fmt.dtype), scale, zero
    if fmt.block == TENSOR:
        return codes, scale, zero
    return codes, scale.index_select(0, picked), zero.index_select(0, picked)


def remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.w_fmt, _ = inputs
    ctx.save_for_backward(*tensors)


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    indices, w, w_scale, w_zero = ctx.saved_tensors
    fmt = format_named(ctx.w_fmt)
    codes, scale, zero = rows_of(indices, w, w_scale, w_zero, fmt=fmt)
    flat, picked = grad.reshape(-1, w.shape[1]).double(), indices.reshape(-1)
    dw, dscale = gradients(flat, codes.double(), scale.double(), zero, fmt)
    if dw is not None:
        dw = torch.zeros_like(w, dtype=torch.float64).index_add(0, picked, dw).to(w.dtype)
    if dscale is not None and fmt.block != TENSOR:
        dscale = torch.zeros_like(w_scale, dtype=torch.float64).index_add(0, picked, dscale)
    if dscale is not None:
        dscale = dscale.to(w_scale.dtype)
    return None, dw, dscale, None, None, None


embedding.register_autograd(backward, setup_context=remember)
