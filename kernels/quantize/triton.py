"""codes = clamp(round(f(x) / scale) + zero, qmin, qmax),   f(x): x, or act(x), or act(x) · up

The same codes, scales and zero points as mpq::quantize and mpq::quantize_dynamic, bit for bit where
f is the identity.  x is read once where a row (or group) fits a tile, else twice: for its range,
and for its codes.  x has any strides and leading sizes; codes are contiguous.  Codes of 4 bits are
stored two in a byte (kernels/triton_packing.py): what reads them on this target knows.

The ops are `triton_op`s: nothing about their launch depends on a size that may be symbolic, so that
Inductor sees the kernel itself, plans its memory and calls it without a dispatcher.
"""

# pyright: reportAssignmentType=false
# In device code constants are annotated as tl.constexpr and are dtypes.

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import register_fake, triton_op, wrap_triton

from mpq_fx.formats import TENSOR, Format, Int, format_named
from mpq_fx.kernels.triton_math import activate, bounds, encode, narrow, scale_and_zero
from mpq_fx.kernels.triton_packing import pack_rows, packed_width, paired

ACTIVATIONS = ("none", "relu", "silu", "gelu", "gelu_tanh")
TILE = 4096  # values that one program works on at a time
PIECE = 32  # packed codes that are stored whole: 16 bytes
LONGEST = 16384  # values of a row that is kept in registers


def refuse_static(fmt: Format) -> Iterator[str]:
    """Why the kernel of given scales does not write codes of this format."""
    yield from _refuse_codes(fmt)
    if fmt.block != TENSOR:
        yield f"{fmt} has more than one scale per tensor, and a static activation has one"


def refuse_dynamic(fmt: Format) -> Iterator[str]:
    """Why the kernel that finds scales itself does not write codes of this format."""
    yield from _refuse_codes(fmt)
    if fmt.block == TENSOR:
        yield f"{fmt} has one scale per tensor, which a kernel of one pass cannot know"
    if fmt.scale not in (None, torch.float32, torch.float16):
        yield f"scales of {fmt} are stored in {fmt.scale}, the kernel writes float32 and float16"


def _refuse_codes(fmt: Format) -> Iterator[str]:
    if fmt.is_plain or fmt.dtype.itemsize != 1:
        yield f"{fmt} has no codes of a byte or of 4 bits"
    if is_packed(fmt) and fmt.block > 0 and fmt.block % PIECE:
        yield f"packed groups are multiples of {PIECE} values, and those of {fmt} are {fmt.block}"


def is_packed(fmt: Format) -> bool:
    """Do kernels store two codes in a byte?"""
    return fmt.element == Int(4)


def stored(codes: Tensor, fmt: Format) -> Tensor:
    """[..., K] codes of the reference as the kernels hand them on."""
    return pack_rows(codes) if is_packed(fmt) else codes


@triton.jit
def load_values(x_ptr, up_ptr, x_at, up_at, mask, ACTIVATION: tl.constexpr):
    """f(x) in float32, rounded like the tensors that it takes the place of."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(tl.float32)
    if ACTIVATION != "none":
        x = narrow(activate(x, ACTIVATION), dtype).to(tl.float32)
    if up_ptr is not None:
        up = tl.load(up_ptr + up_at, mask=mask, other=0.0).to(tl.float32)
        x = narrow(x * up, dtype).to(tl.float32)
    return x


@triton.jit
def store_codes(
    codes_ptr, codes, row, first, end, is_mine, stride_c, PACKED: tl.constexpr
):  # fmt: skip
    """[BLOCK_M, BLOCK_K] codes of values `first` to `end` of rows; packed, with zeros behind K."""
    BLOCK_K: tl.constexpr = codes.shape[1]
    if PACKED:
        byte = first // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
        mask = is_mine & (byte < (end + 31) // 32 * 16)
        tl.store(codes_ptr + row * stride_c + byte, paired(codes), mask=mask)
    else:
        k = first + tl.arange(0, BLOCK_K)[None, :]
        tl.store(codes_ptr + row * stride_c + k, codes, mask=is_mine & (k < end))


@triton.jit
def static_kernel(
    x_ptr,
    up_ptr,
    scale_ptr,
    zero_ptr,
    codes_ptr,
    rows,
    K,
    stride_xm,
    stride_xk,
    stride_um,
    stride_uk,
    stride_c,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    PACKED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    first = tl.program_id(1).to(tl.int64) * BLOCK_K
    k = first + tl.arange(0, BLOCK_K)[None, :]
    mask = (row < rows) & (k < K)
    x_at, up_at = row * stride_xm + k * stride_xk, row * stride_um + k * stride_uk
    x = load_values(x_ptr, up_ptr, x_at, up_at, mask, ACTIVATION)
    dtype: tl.constexpr = tl.int8 if PACKED else codes_ptr.dtype.element_ty
    codes = encode(x, tl.load(scale_ptr).to(tl.float32), tl.load(zero_ptr), LOW, HIGH, dtype)
    store_codes(codes_ptr, codes, row, first, K, row < rows, stride_c, PACKED)


@triton.jit
def dynamic_kernel(
    x_ptr,
    up_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    blocks,
    groups,
    length,
    K,
    stride_xm,
    stride_xk,
    stride_um,
    stride_uk,
    stride_c,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    PACKED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    """Each of `blocks` pieces of rows has `length` values and a scale; the last may be short."""
    block = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    is_mine = block < blocks
    row, first = block // groups, block % groups * length
    end = tl.minimum(first + length, K)
    k = first + tl.arange(0, BLOCK_K)[None, :]
    x_at, up_at = row * stride_xm, row * stride_um
    dtype: tl.constexpr = tl.int8 if PACKED else codes_ptr.dtype.element_ty
    kept: tl.constexpr = scale_ptr.dtype.element_ty
    if IS_WHOLE:
        mask = is_mine & (k < end)
        at, beside = x_at + k * stride_xk, up_at + k * stride_uk
        x = load_values(x_ptr, up_ptr, at, beside, mask, ACTIVATION)
        low, high = bounds(x)
        scale, zero = scale_and_zero(low, high, LOW, HIGH, SYMMETRIC, kept)
        codes = encode(x, scale, zero, LOW, HIGH, dtype)
        store_codes(codes_ptr, codes, row, first, end, is_mine, stride_c, PACKED)
    else:
        low = tl.zeros((BLOCK_M, 1), tl.float32)
        high = tl.zeros((BLOCK_M, 1), tl.float32)
        for start in range(0, length, BLOCK_K):
            mask = is_mine & (start + k < end)
            at, beside = x_at + (start + k) * stride_xk, up_at + (start + k) * stride_uk
            x = load_values(x_ptr, up_ptr, at, beside, mask, ACTIVATION)
            least, largest = bounds(x)
            low, high = tl.minimum(low, least), tl.maximum(high, largest)
        scale, zero = scale_and_zero(low, high, LOW, HIGH, SYMMETRIC, kept)
        for start in range(0, length, BLOCK_K):
            mask = is_mine & (start + k < end)
            at, beside = x_at + (start + k) * stride_xk, up_at + (start + k) * stride_uk
            x = load_values(x_ptr, up_ptr, at, beside, mask, ACTIVATION)
            codes = encode(x, scale, zero, LOW, HIGH, dtype)
            store_codes(codes_ptr, codes, row, first + start, end, is_mine, stride_c, PACKED)
    tl.store(scale_ptr + block, scale.to(kept), mask=is_mine)
    tl.store(zero_ptr + block, zero, mask=is_mine)


@triton_op("mpq_triton::quantize", mutates_args=())
def quantize(x: Tensor, scale: Tensor, zero: Tensor, fmt: str) -> Tensor:
    return launch_static(x, None, scale, zero, format_named(fmt), "none")


@triton_op("mpq_triton::quantize_dynamic", mutates_args=())
def quantize_dynamic(x: Tensor, fmt: str) -> tuple[Tensor, Tensor, Tensor]:
    return launch_dynamic(x, None, format_named(fmt), "none")


@triton_op("mpq_triton::activation_quantize", mutates_args=())
def activation_quantize(
    x: Tensor, up: Tensor | None, scale: Tensor, zero: Tensor, activation: str, fmt: str
) -> Tensor:
    return launch_static(x, up, scale, zero, format_named(fmt), activation)


@triton_op("mpq_triton::activation_quantize_dynamic", mutates_args=())
def activation_quantize_dynamic(
    x: Tensor, up: Tensor | None, activation: str, fmt: str
) -> tuple[Tensor, Tensor, Tensor]:
    return launch_dynamic(x, up, format_named(fmt), activation)


def launch_static(
    x: Tensor, up: Tensor | None, scale: Tensor, zero: Tensor, fmt: Format, activation: str
) -> Tensor:
    codes, rows = empty_codes(x, fmt), rows_of(x)
    beside = rows if up is None else rows_of(up)
    count, k = rows.shape
    block = min(block_of(k, fmt), TILE)
    tile = {"BLOCK_M": max(1, TILE // block), "BLOCK_K": block}
    grid = (triton.cdiv(count, tile["BLOCK_M"]), triton.cdiv(k, block))
    wrap_triton(static_kernel)[grid](
        *(rows, up if up is None else beside, scale, zero, codes, count, k),
        *(*rows.stride(), *beside.stride(), width(codes)),
        LOW=fmt.qmin,
        HIGH=fmt.qmax,
        PACKED=is_packed(fmt),
        ACTIVATION=activation,
        **tile,
    )
    return codes


def launch_dynamic(
    x: Tensor, up: Tensor | None, fmt: Format, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    codes, (scale, zero), rows = empty_codes(x, fmt), empty_scales(x, fmt), rows_of(x)
    beside = rows if up is None else rows_of(up)
    count, k = rows.shape
    groups, length = fmt.groups(k), fmt.block or k
    block = block_of(min(length, k) if isinstance(k, int) else length, fmt)
    is_whole = block <= LONGEST
    if not is_whole:
        block = TILE
    tile = {"BLOCK_M": max(1, TILE // block), "BLOCK_K": block, "IS_WHOLE": is_whole}
    grid = (triton.cdiv(count * groups, tile["BLOCK_M"]),)
    wrap_triton(dynamic_kernel)[grid](
        *(rows, up if up is None else beside, codes, scale, zero),
        *(count * groups, groups, length, k, *rows.stride(), *beside.stride(), width(codes)),
        LOW=fmt.qmin,
        HIGH=fmt.qmax,
        SYMMETRIC=fmt.symmetric,
        PACKED=is_packed(fmt),
        ACTIVATION=activation,
        **tile,
        num_warps=8 if block > TILE else 4,
    )
    return codes, scale, zero


def rows_of(x: Tensor) -> Tensor:
    """[…, K] -> [rows, K]: a view, but of strides that no view of two dimensions has."""
    k = x.shape[-1] if x.ndim else 1
    return x.reshape(math.prod(x.shape[:-1]), k)


def power_of_two(k: int) -> int:
    """The next one, at least 1; of a symbolic size one that fits no tile, so that any size may."""
    if not isinstance(k, int):
        return 2 * LONGEST
    return 1 << max(k - 1, 0).bit_length()


def block_of(k: int, fmt: Format) -> int:
    """Values of a tile along K: packed ones are stored in whole pieces."""
    return max(power_of_two(k), PIECE) if is_packed(fmt) else power_of_two(k)


def empty_codes(x: Tensor, fmt: Format) -> Tensor:
    """[..., K] codes, or the [..., 16 ceil(K / 32)] bytes in which they are packed"""
    if not is_packed(fmt):
        return x.new_empty(x.shape, dtype=fmt.dtype)
    k = x.shape[-1] if x.ndim else 1
    return x.new_empty((*x.shape[:-1], packed_width(k)), dtype=torch.uint8)


def width(codes: Tensor) -> int:
    """From one row of codes to the next."""
    return codes.shape[-1] if codes.ndim else 1


def empty_scales(x: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """Scales and zero points, contiguous."""
    shape = fmt.scale_shape(x.shape)
    return x.new_empty(shape, dtype=fmt.scale), x.new_empty(shape, dtype=torch.int32)


# The fake of a triton_op would trace its launch, which an interpreted kernel does not allow.


@register_fake("mpq_triton::quantize")
def _(x: Tensor, scale: Tensor, zero: Tensor, fmt: str) -> Tensor:
    return empty_codes(x, format_named(fmt))


@register_fake("mpq_triton::quantize_dynamic")
def _(x: Tensor, fmt: str) -> tuple[Tensor, Tensor, Tensor]:
    named = format_named(fmt)
    return empty_codes(x, named), *empty_scales(x, named)


@register_fake("mpq_triton::activation_quantize")
def _(
    x: Tensor, up: Tensor | None, scale: Tensor, zero: Tensor, activation: str, fmt: str
) -> Tensor:
    return empty_codes(x, format_named(fmt))


@register_fake("mpq_triton::activation_quantize_dynamic")
def _(x: Tensor, up: Tensor | None, activation: str, fmt: str) -> tuple[Tensor, Tensor, Tensor]:
    named = format_named(fmt)
    return empty_codes(x, named), *empty_scales(x, named)
