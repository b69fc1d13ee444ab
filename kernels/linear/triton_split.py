"""y[m, n] = Σ_s parts[s, m, n], times the scales that are left, and what follows a linear

The second kernel of a linear whose K is split over programs.  Each of them has written its sums to
a place of its own, and they are added in the order of s.  Not by atomic additions: they arrive in
another order on every call, on which a sum of floats depends, and they would need a buffer of zeros
first.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# A kernel has options besides its arguments, and constants are not what they are annotated as.

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from mpq_fx.kernels.linear.triton_epilogue import Epilogue, finish
from mpq_fx.kernels.tile import Machine, Tile

WAVES = 2  # programs for each multiprocessor that a split of K aims at
SPLIT_STEPS = 4  # a program of a split takes at least so many steps along K
MANY_ROWS = 64  # more give enough programs, and partial sums that take longer than weights
BLOCK = 512  # 16 bytes of each part per thread


def divided(tile: Tile, m: int, n: int, k: int, at: Machine) -> Tile:
    """The tile with K split over programs, where rows are few and programs would be too."""
    if m > MANY_ROWS:
        return tile
    programs, steps = tile.count(m, n), -(-k // tile.block_k)
    split = min(WAVES * at.processors // programs, steps // SPLIT_STEPS)
    return replace(tile, split_k=1 << max(split, 1).bit_length() - 1)


@triton.jit
def scaled(
    y, x_scale_ptr, w_scale_ptr, first_row, first_column, M, N, STRIDE_S: tl.constexpr
):  # fmt: skip
    """A tile of whole sums times the scales of the activation's rows, and then of the weight's."""
    y = y.to(tl.float32)
    if x_scale_ptr is not None:
        row = (first_row + tl.arange(0, y.shape[0])) % M
        y *= tl.load(x_scale_ptr + row * STRIDE_S).to(tl.float32)[:, None]
    if w_scale_ptr is not None:
        column = (first_column + tl.arange(0, y.shape[1])) % N
        y *= tl.load(w_scale_ptr + column).to(tl.float32)[None, :]
    return y


@triton.jit
def store_part(y, parts_ptr, part, first_row, first_column, M, N):
    """A tile of the sums of one part; offsets inside of the tile have 32 bits."""
    row = tl.arange(0, y.shape[0])[:, None]
    column = tl.arange(0, y.shape[1])[None, :]
    first = parts_ptr + (part.to(tl.int64) * M + first_row) * N + first_column
    mask = (row < M - first_row) & (column < N - first_column)
    tl.store(first + row * N + column, y, mask=mask)


@triton.jit
def reduce_kernel(
    parts_ptr, x_scale_ptr, w_scale_ptr, y_ptr,
    bias_ptr, addend_ptr, addend_scale_ptr, addend_zero_ptr, out_scale_ptr, out_zero_ptr,
    M, N, stride_am, stride_an,
    ACTIVATION: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    STRIDE_S: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first_row = tl.program_id(0).to(tl.int64)
    first_column = tl.program_id(1).to(tl.int64) * BLOCK
    column = tl.arange(0, BLOCK)[None, :]
    y = tl.zeros((1, BLOCK), parts_ptr.dtype.element_ty)
    for part in tl.static_range(SPLIT):
        first = parts_ptr + (first_row + part * M) * N + first_column
        y += tl.load(first + column, mask=column < N - first_column, other=0)
    y = scaled(y, x_scale_ptr, w_scale_ptr, first_row, first_column, M, N, STRIDE_S)
    after = (addend_ptr, addend_scale_ptr, addend_zero_ptr, out_scale_ptr, out_zero_ptr)
    at = (first_row, first_column, M, N)
    finish(y, y_ptr, *at, bias_ptr, *after, stride_am, stride_an, ACTIVATION, LOW, HIGH)


def add_parts(
    parts: Tensor,
    y: Tensor,
    epilogue: Epilogue,
    x_scale: Tensor | None = None,
    w_scale: Tensor | None = None,
) -> None:
    """[S, M, N] into y [M, N]; `x_scale` has one number per row, or one."""
    split, m, n = parts.shape
    reduce_kernel[(m, triton.cdiv(n, BLOCK))](
        *(parts, x_scale, w_scale, y),
        M=m,
        N=n,
        STRIDE_S=0 if x_scale is None or x_scale.numel() == 1 else 1,
        SPLIT=split,
        BLOCK=BLOCK,
        num_warps=4,
        **epilogue.arguments(n),
    )
