"""y[m, n] = sx[m] · sw[n] · (Σ_k x[m, k] · w[n, k] - zx[m] · Σ_k w[n, k])   int8 × int8 -> int32

The sum is exact, as is the correction for the zero point of x: the sums of the weight's rows are
packed beside it.  uint8 codes are read as int8 ones, 128 lower, since a tensor core multiplies
operands of one signedness, and so is their zero point.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# Triton's own types know neither what a launch takes besides nor what device functions return.
from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpq_fx.formats import ROW, TENSOR, Format, Int
from mpq_fx.kernels.linear.triton_epilogue import finish, tile_of
from mpq_fx.kernels.linear.triton_linear import Call, LinearKernel, Shape, define
from mpq_fx.kernels.quantize.triton import is_packed
from mpq_fx.kernels.tile import Machine, Tile, around, filling, fitting, held, machine, roomy

NAME = "int8_linear"
# rows up to -> tiles, the largest first: it is taken where it gives every processor a program.
TILES = {
    16: (Tile(16, 64, 256, 1, 4, 4), Tile(16, 32, 256, 1, 4, 4), Tile(16, 16, 256, 1, 2, 4)),
    32: (Tile(32, 64, 256, 1, 4, 3), Tile(32, 32, 256, 1, 4, 3), Tile(32, 16, 256, 1, 2, 3)),
    64: (Tile(64, 128, 128, 4, 4, 4), Tile(64, 64, 128, 4, 4, 4), Tile(64, 32, 128, 4, 4, 4)),
    256: (Tile(128, 128, 128, 8, 8, 3), Tile(64, 128, 128, 8, 4, 3), Tile(64, 64, 128, 8, 4, 4)),
    0: (  # more
        Tile(128, 256, 128, 8, 8, 3),
        Tile(128, 128, 128, 8, 8, 3),
        Tile(128, 128, 64, 8, 8, 4),
        Tile(64, 64, 128, 8, 4, 4),
    ),
}
CODES = (torch.int8, torch.uint8)
LARGEST = (1 << 31) - 1  # of an int32 sum


def refuse_formats(x: Format, w: Format) -> Iterator[str]:
    """Why this linear is not for int8 tensor cores."""
    if w.element != Int(8) or w.block not in (ROW, TENSOR) or not w.symmetric:
        yield f"weights are int8 with a scale per row and no zero point here, not {w}"
    if x.dtype not in CODES or is_packed(x) or x.block not in (ROW, TENSOR):
        yield f"activations are codes of 8 bits with a scale per row or tensor here, not {x}"


def refuse_shape(shape: Shape) -> Iterator[str]:
    """Where a sum does not fit."""
    x, w = shape.x_fmt, shape.w_fmt
    if shape.k * w.qmax * (x.qmax - x.qmin) > LARGEST:
        yield f"int32 sums of {shape.k} products of {x} and {w} may overflow"


def pack(w: Tensor, scale: Tensor, zero: Tensor, fmt: Format) -> tuple[Tensor, ...]:
    """(codes [N, K] in rows, their scales [N], the sums of the rows [N] in int32)"""
    codes = w.clone(memory_format=torch.contiguous_format)
    scales = scale.float().reshape(-1).expand(w.shape[0]).clone()
    return codes, scales, w.sum(1, dtype=torch.int32)


def tile(m: int, n: int, k: int, at: Machine, *, is_plain: bool) -> Tile:
    """By the table: the largest that gives every processor a program."""
    tiles = listed(m, at)
    return filling(tiles if is_plain else roomy(tiles), at, m, n)


def listed(m: int, at: Machine) -> tuple[Tile, ...]:
    """The tiles of the table for so many rows."""
    return fitting(TILES[next((rows for rows in TILES if m <= rows), 0)], at, 1, 1)


def configurations(m: int, n: int, k: int, at: Machine) -> tuple[Tile, ...]:
    """What a search tries: the tiles of the table for so many rows, and each one's neighbors."""
    found = (near for tile in listed(m, at) for near in around(tile))
    return fitting(held(tuple(dict.fromkeys(found))), at, 1, 1)


@triton.jit
def int8_kernel(
    x_ptr,
    x_scale_ptr,
    x_zero_ptr,
    w_ptr,
    w_scale_ptr,
    sums_ptr,
    y_ptr,
    bias_ptr,
    addend_ptr,
    addend_scale_ptr,
    addend_zero_ptr,
    out_scale_ptr,
    out_zero_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_am,
    stride_an,
    STRIDE_S: tl.constexpr,
    SHIFT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    IS_EVEN: tl.constexpr,
):
    first_row, first_column = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    row = first_row + tl.arange(0, BLOCK_M)
    column = first_column + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows and columns past the end read those of the beginning, and are not stored.
    stride_xk = tl.cast(stride_xk, tl.int64)
    x_at = x_ptr + (row % M)[:, None] * stride_xm + k[None, :] * stride_xk
    w_at = w_ptr + (column % N)[None, :] * K + k[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, K, BLOCK_K):
        if IS_EVEN:
            x, w = tl.load(x_at), tl.load(w_at)
        else:
            x = tl.load(x_at, mask=k[None, :] < K - start, other=0)
            w = tl.load(w_at, mask=k[:, None] < K - start, other=0)
        if SHIFT:
            x = (x ^ 128).to(tl.int8, bitcast=True)
        sums = tl.dot(x, w, sums, out_dtype=tl.int32)
        x_at += BLOCK_K * stride_xk
        w_at += BLOCK_K
    row, column = (row % M)[:, None], (column % N)[None, :]
    if x_zero_ptr is not None:
        zero = tl.load(x_zero_ptr + row * STRIDE_S) - SHIFT
        sums -= zero * tl.load(sums_ptr + column)
    y = sums.to(tl.float32) * tl.load(x_scale_ptr + row * STRIDE_S)
    y = y * tl.load(w_scale_ptr + column)
    after = (addend_ptr, addend_scale_ptr, addend_zero_ptr, out_scale_ptr, out_zero_ptr)
    at = (first_row, first_column, M, N)
    finish(y, y_ptr, *at, bias_ptr, *after, stride_am, stride_an, ACTIVATION, LOW, HIGH)


def launch(call: Call) -> Tensor:
    """One program per tile of results."""
    y, (w, scales, sums) = call.empty(), call.packed
    (m, k), n = call.x.shape, call.n
    is_plain = call.epilogue.is_plain
    cut = call.tile or tile(m, n, k, machine(call.x.device), is_plain=is_plain)
    int8_kernel[(cut.count(m, n),)](
        *(call.x, call.x_scale, call.x_zero, w, scales, sums, y),
        M=m,
        N=n,
        K=k,
        stride_xm=call.x.stride(0),
        stride_xk=call.x.stride(1),
        STRIDE_S=0 if call.x_fmt.block == TENSOR else 1,
        SHIFT=0 if call.x_fmt.dtype == torch.int8 else 128,
        BLOCK_M=cut.block_m,
        BLOCK_N=cut.block_n,
        BLOCK_K=cut.block_k,
        GROUP_M=cut.group_m,
        IS_EVEN=k % cut.block_k == 0,
        num_warps=cut.warps,
        num_stages=cut.stages,
        **call.epilogue.arguments(n),
    )
    return y


INT8 = define(LinearKernel(NAME, refuse_formats, refuse_shape, pack, launch, configurations))
