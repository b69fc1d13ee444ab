"""codes = clamp(round(norm(x) / scale) + zero, qmin, qmax)

layer norm   (x - mean) / √(variance + eps) · weight + bias
RMS norm     x / √(mean x² + eps) · weight

A row is read once and stays in registers.  Sums are float32 sums in the order of the device, so a
code may differ by one step from that of a norm that was computed apart.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor
from torch.library import register_fake, triton_op, wrap_triton

from mpq_fx.formats import ROW, Format, format_named
from mpq_fx.kernels.quantize.triton import (
    LONGEST,
    TILE,
    block_of,
    empty_codes,
    empty_scales,
    is_packed,
    rows_of,
    store_codes,
    width,
)
from mpq_fx.kernels.triton_math import bounds, encode, narrow, scale_and_zero


def refuse(fmt: Format, k: int, *, is_static: bool) -> Iterator[str]:
    """Why a norm over rows of k values is not computed in front of this quantization."""
    if k > LONGEST:
        yield f"a row of {k} values does not stay in registers: up to {LONGEST} do"
    if not is_static and fmt.block != ROW:
        yield f"{fmt} has scales of groups, and a norm needs the whole row"


@triton.jit
def norm_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    zero_ptr,
    codes_ptr,
    rows,
    K,
    eps,
    stride_xm,
    stride_xk,
    stride_w,
    stride_b,
    stride_c,
    IS_CENTERED: tl.constexpr,
    IS_STATIC: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    k = tl.arange(0, BLOCK_K)[None, :].to(tl.int64)
    mask = (row < rows) & (k < K)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * stride_xm + k * stride_xk, mask=mask, other=0.0).to(tl.float32)
    if IS_CENTERED:
        x = tl.where(k < K, x - tl.sum(x, 1, keep_dims=True) / K, 0.0)
    power = tl.sum(x * x, 1, keep_dims=True) / K
    y = x * tl.rsqrt(power + tl.full((1, 1), eps, tl.float32))  # Inductor passes fp64
    if weight_ptr is not None:
        y = y * tl.load(weight_ptr + k * stride_w, mask=k < K, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y = y + tl.load(bias_ptr + k * stride_b, mask=k < K, other=0.0).to(tl.float32)
    y = narrow(y, dtype).to(tl.float32)
    if IS_STATIC:
        scale, zero = tl.load(scale_ptr).to(tl.float32), tl.load(zero_ptr)
    else:
        low, high = bounds(y)
        kept: tl.constexpr = scale_ptr.dtype.element_ty
        scale, zero = scale_and_zero(low, high, LOW, HIGH, SYMMETRIC, kept)
        tl.store(scale_ptr + row, scale.to(kept), mask=row < rows)
        tl.store(zero_ptr + row, zero, mask=row < rows)
    stored: tl.constexpr = tl.int8 if PACKED else codes_ptr.dtype.element_ty
    codes = encode(y, scale, zero, LOW, HIGH, stored)
    store_codes(codes_ptr, codes, row, 0, K, row < rows, stride_c, PACKED)


@triton_op("mpq_triton::norm_quantize", mutates_args=())
def norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    zero: Tensor,
    eps: float,
    is_centered: bool,
    fmt: str,
) -> Tensor:
    codes = empty_codes(x, format_named(fmt))
    launch(x, (weight, bias), (codes, scale, zero), eps, is_centered, format_named(fmt), True)
    return codes


@triton_op("mpq_triton::norm_quantize_dynamic", mutates_args=())
def norm_quantize_dynamic(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    is_centered: bool,
    fmt: str,
) -> tuple[Tensor, Tensor, Tensor]:
    named = format_named(fmt)
    codes, (scale, zero) = empty_codes(x, named), empty_scales(x, named)
    launch(x, (weight, bias), (codes, scale, zero), eps, is_centered, named, False)
    return codes, scale, zero


def launch(
    x: Tensor,
    affine: tuple[Tensor | None, Tensor | None],
    found: tuple[Tensor, Tensor, Tensor],
    eps: float,
    is_centered: bool,
    fmt: Format,
    is_static: bool,
) -> None:
    rows, (weight, bias), (codes, scale, zero) = rows_of(x), affine, found
    count, k = rows.shape
    block = block_of(k, fmt)
    block_m = max(1, TILE // block)
    wrap_triton(norm_kernel)[(triton.cdiv(count, block_m),)](
        *(rows, weight, bias, scale, zero, codes, count, k, eps, *rows.stride()),
        *(0 if vector is None else vector.stride(0) for vector in affine),
        width(codes),
        IS_CENTERED=is_centered,
        IS_STATIC=is_static,
        LOW=fmt.qmin,
        HIGH=fmt.qmax,
        SYMMETRIC=fmt.symmetric,
        PACKED=is_packed(fmt),
        BLOCK_M=block_m,
        BLOCK_K=block,
        num_warps=8 if block > TILE else 4,
    )


@register_fake("mpq_triton::norm_quantize")
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    zero: Tensor,
    eps: float,
    is_centered: bool,
    fmt: str,
) -> Tensor:
    return empty_codes(x, format_named(fmt))


@register_fake("mpq_triton::norm_quantize_dynamic")
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    is_centered: bool,
    fmt: str,
) -> tuple[Tensor, Tensor, Tensor]:
    named = format_named(fmt)
    return empty_codes(x, named), *empty_scales(x, named)
