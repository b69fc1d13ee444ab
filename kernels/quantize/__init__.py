"""codes = clamp(round(x / scale) + zero, qmin, qmax)

quantize: scale and zero are given (static); quantize_dynamic: they are those of x, per tensor, per
row or per group along the last dimension; quantize_weight: the same over [rows, K], where rows are
dimension 0 and K is the rest.  A tie goes to the even step.  Codes of a scaled float are the values
of its element nearest to x / scale, in the dtype torch has for them.

Codes carry no gradient, those of floats neither: a straight-through estimator belongs to training,
not to the op.  The scale of a dynamic or weight quantization has its exact derivative.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mpq_fx import numerics
from mpq_fx.errors import UnsupportedError
from mpq_fx.formats import Format, format_named


@torch.library.custom_op("mpq::quantize", mutates_args=())
def quantize(x: Tensor, scale: Tensor, zero: Tensor, fmt: str) -> Tensor:
    named = coded(fmt)
    return filled(x, numerics.quantize(x, named, scale, zero).codes)


@quantize.register_fake
def _(x: Tensor, scale: Tensor, zero: Tensor, fmt: str) -> Tensor:
    return torch.empty_like(x, dtype=coded(fmt).dtype)


@torch.library.custom_op("mpq::quantize_dynamic", mutates_args=())
def quantize_dynamic(x: Tensor, fmt: str) -> tuple[Tensor, Tensor, Tensor]:
    q = numerics.quantize(x, coded(fmt))
    return filled(x, q.codes), q.scale, q.zero


@quantize_dynamic.register_fake
def _(x: Tensor, fmt: str) -> tuple[Tensor, Tensor, Tensor]:
    return empty(x, x.shape, coded(fmt))


@torch.library.custom_op("mpq::quantize_weight", mutates_args=())
def quantize_weight(w: Tensor, fmt: str) -> tuple[Tensor, Tensor, Tensor]:
    q = numerics.quantize_weight(w, coded(fmt))
    return filled(w, q.codes), q.scale, q.zero


@quantize_weight.register_fake
def _(w: Tensor, fmt: str) -> tuple[Tensor, Tensor, Tensor]:
    return empty(w, numerics.weight_rows(w).shape, coded(fmt))


def coded(name: str) -> Format:
    """The format, if it has codes and scales."""
    fmt = format_named(name)
    if fmt.is_plain:
        raise UnsupportedError(f"{fmt} is a plain float, without a scale", fix=f"x.to({fmt.dtype})")
    return fmt


def filled(x: Tensor, codes: Tensor) -> Tensor:
    """The codes with the strides that the fake promises."""
    return torch.empty_like(x, dtype=codes.dtype).copy_(codes)


def empty(x: Tensor, shape: torch.Size, fmt: Format) -> tuple[Tensor, Tensor, Tensor]:
    scales = fmt.scale_shape(shape)
    return (
        torch.empty_like(x, dtype=fmt.dtype),
        x.new_empty(scales, dtype=fmt.scale),
        x.new_empty(scales, dtype=torch.int32),
    )


def scale_gradient(grad: Tensor, x: Tensor, fmt: Format) -> Tensor:
    """∂L/∂scale -> ∂L/∂x: 1 / levels at the values that set the range, shared among equals"""
    k = x.shape[-1] if x.ndim else 1
    low, high = numerics.ranges(x, fmt)
    exact = x.float()

    def share(bound: Tensor, magnitude: Tensor) -> Tensor:
        edge = numerics.spread(bound, fmt, k)
        hits = ((magnitude == edge) & (edge > 0)).float()
        count = numerics.block_sums(hits, fmt, bound).clamp(min=1.0)
        return hits * numerics.spread(grad.float() / count, fmt, k)

    if fmt.symmetric:
        both = share(torch.maximum(-low, high), exact.abs()) * exact.sign()
        return (both / fmt.max).view(x.shape).to(x.dtype)
    apart = share(high, exact) - share(-low, -exact)
    return (apart / (fmt.qmax - fmt.qmin)).view(x.shape).to(x.dtype)


def remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, ctx.fmt = inputs
    ctx.save_for_backward(x)
    ctx.mark_non_differentiable(output[0])  # else autograd would ask codes of floats for gradients


def forget(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Static codes depend on no float in a way that has a derivative."""
    ctx.mark_non_differentiable(output)


def static_backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
    return None, None, None, None


def dynamic_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
    (x,) = ctx.saved_tensors
    return scale_gradient(grads[1], x, coded(ctx.fmt)), None


def weight_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
    (w,) = ctx.saved_tensors
    rows = scale_gradient(grads[1], numerics.weight_rows(w), coded(ctx.fmt))
    return rows.view(w.shape), None


quantize.register_autograd(static_backward, setup_context=forget)
quantize_dynamic.register_autograd(dynamic_backward, setup_context=remember)
quantize_weight.register_autograd(weight_backward, setup_context=remember)
