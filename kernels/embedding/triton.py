"""y[…, d] = (w[i, d] - zw[i, g]) · sw[i, g],   i = indices[…],  g = d // block

The rows that are looked up are gathered and widened in one pass: in float32, then cast.  An index
out of range traps on the device, as in torch; the interpreter raises.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# A kernel has options besides its arguments, and constants are not what they are annotated as.

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from mpq_fx.formats import TENSOR, Format, format_named
from mpq_fx.kernels.triton_math import narrow
from mpq_fx.numerics import pack_int4

SHARED = 32  # neighbors of a row that a thread gives one scale, or fewer
LONGEST = 1024  # codes of a row that a program takes
CODES = (2048, 4096)  # that it takes in all, of 8 and of 4 bits: 16 bytes per thread


def refuse(fmt: Format) -> Iterator[str]:
    """Why this kernel does not look up rows of such a table."""
    if fmt.is_plain or fmt.has_float_codes:
        yield f"{fmt} has no integer codes"
    if fmt.block > 0 and fmt.block % 16:
        yield f"groups are multiples of 16 here, and those of {fmt} are {fmt.block}"


@triton.jit
def embedding_kernel(
    indices_ptr,
    w_ptr,
    scale_ptr,
    zero_ptr,
    y_ptr,
    count,
    rows,
    stored,
    D,
    stride_i,
    stride_wi,
    stride_si,
    stride_sg,
    stride_zi,
    stride_zg,
    GROUP: tl.constexpr,
    IS_PACKED: tl.constexpr,
    BLOCK_I: tl.constexpr,
    RUNS: tl.constexpr,
    RUN: tl.constexpr,
):
    """RUN neighbors of a row, which share a scale, are a thread's."""
    at = (tl.program_id(0).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I))[:, None, None]
    index = tl.load(indices_ptr + at * stride_i, mask=at < count, other=0).to(tl.int64)
    tl.device_assert((index >= 0) & (index < rows), "index out of range in embedding")
    run = (tl.program_id(1) * RUNS + tl.arange(0, RUNS))[None, :, None]
    if IS_PACKED:
        byte = run * (RUN // 2) + tl.arange(0, RUN // 2)[None, None, :]
        inside = (at < count) & (byte < stored)
        both = tl.load(w_ptr + index * stride_wi + byte, mask=inside, other=0).to(tl.int8)
        low = (both << 4) >> 4  # the shift back copies the sign
        codes = tl.reshape(tl.join(low, both >> 4), (BLOCK_I, RUNS, RUN))
    else:
        byte = run * RUN + tl.arange(0, RUN)[None, None, :]
        inside = (at < count) & (byte < stored)
        codes = tl.load(w_ptr + index * stride_wi + byte, mask=inside, other=0)
    group = run * RUN // GROUP if GROUP else run * 0
    inside = (at < count) & (run * RUN < D)
    y = codes.to(tl.float32)
    if zero_ptr is not None:
        zero_at = zero_ptr + index * stride_zi + group * stride_zg
        y -= tl.load(zero_at, mask=inside, other=0).to(tl.float32)
    scale_at = scale_ptr + index * stride_si + group * stride_sg
    y *= tl.load(scale_at, mask=inside, other=0.0).to(tl.float32)
    d = run * RUN + tl.arange(0, RUN)[None, None, :]
    stored_y = narrow(y, y_ptr.dtype.element_ty)
    tl.store(y_ptr + at * D + d, stored_y, mask=(at < count) & (d < D))


@torch.library.custom_op("mpq_triton::embedding_pack", mutates_args=())
def pack(w: Tensor, fmt: str) -> Tensor:
    """[rows, D] codes -> rows of bytes, two codes of 4 bits in each"""
    if format_named(fmt).element.bits == 4:
        return pack_int4(w).contiguous()
    return w.clone(memory_format=torch.contiguous_format)


@pack.register_fake
def _(w: Tensor, fmt: str) -> Tensor:
    rows, length = w.shape
    if format_named(fmt).element.bits == 4:
        return w.new_empty((rows, (length + 1) // 2), dtype=torch.uint8)
    return w.new_empty((rows, length))


@torch.library.custom_op("mpq_triton::embedding", mutates_args=())
def embedding(
    indices: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    length: int,
    w_fmt: str,
    out_dtype: torch.dtype,
) -> Tensor:
    return launch(indices, packed, scale, zero, length, format_named(w_fmt), out_dtype)


@embedding.register_fake
def _(
    indices: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    length: int,
    w_fmt: str,
    out_dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty((*indices.shape, length), dtype=out_dtype)


def launch(
    indices: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    length: int,
    fmt: Format,
    out_dtype: torch.dtype,
) -> Tensor:
    """Indices of any shape and strides; `packed` has contiguous rows of `length` codes."""
    y = packed.new_empty((*indices.shape, length), dtype=out_dtype)
    if y.numel() == 0:
        return y
    rows = packed.shape[0]
    if knobs.runtime.interpret:  # which leaves assertions out, and would read anything
        check(indices, rows)
    scales, zeros = (by_row(part, fmt, rows) for part in (scale, zero))
    run = math.gcd(fmt.block, SHARED) if fmt.block > 0 else SHARED
    runs = min(triton.next_power_of_2(triton.cdiv(length, run)), LONGEST // run)
    block = CODES[fmt.element.bits == 4] // (runs * run)
    tile = {"BLOCK_I": block, "RUNS": runs, "RUN": run}
    flat = indices.reshape(-1)  # a view still, of the last token of each row: with a stride
    grid = (triton.cdiv(len(flat), block), triton.cdiv(length, runs * run))
    embedding_kernel[grid](
        *(flat, packed, scales, zeros, y, len(flat), *packed.shape, length),
        stride_i=flat.stride(0),
        stride_wi=packed.stride(0),
        **strides("s", scales),
        **strides("z", zeros),
        GROUP=max(fmt.block, 0),
        IS_PACKED=fmt.element.bits == 4,
        **tile,
        num_warps=4,
        debug=True,  # or no index would be checked
        sanitize_overflow=False,
    )
    return y


def check(indices: Tensor, rows: int) -> None:
    """Refuse indices out of range on the host."""
    low, high = (int(edge) for edge in indices.aminmax())
    if low < 0 or high >= rows:
        bad = low if low < 0 else high
        raise IndexError(f"index {bad} is out of range in an embedding of {rows} rows")


def by_row(part: Tensor | None, fmt: Format, rows: int) -> Tensor | None:
    """[rows, groups] of a scale or zero point, whatever it is shared by."""
    if part is None or fmt.block != TENSOR:
        return part
    return part.expand(rows, 1)


def strides(letter: str, part: Tensor | None) -> dict[str, int]:
    both = (0, 0) if part is None else part.stride()
    return {f"stride_{letter}i": both[0], f"stride_{letter}g": both[1]}
