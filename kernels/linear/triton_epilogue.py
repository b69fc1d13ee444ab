"""y  ->  clamp(round(act(y + bias + addend) / scale) + zero)   before a kernel stores its result

What every Triton kernel of mpq::linear does with its float32 sums: each part may be left out.  The
addend is a float tensor, or codes with a scale and a zero point.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpq_fx.formats import Format
from mpq_fx.kernels.triton_math import activate, encode, narrow

WIDEST = 512  # rows or columns of a tile


@dataclass(frozen=True)
class Epilogue:
    """What happens to the result of a linear before it is stored."""

    dtype: torch.dtype  # of floats that are stored
    bias: Tensor | None = None  # [N]
    addend: Tensor | None = None  # of the shape of the result
    addend_scale: Tensor | None = None  # of an addend in codes: one number
    addend_zero: Tensor | None = None
    activation: str = "none"
    out_fmt: Format | None = None  # of codes that are stored in place of floats
    out_scale: Tensor | None = None  # one number
    out_zero: Tensor | None = None

    @property
    def out_dtype(self) -> torch.dtype:
        return self.dtype if self.out_fmt is None else self.out_fmt.dtype

    @property
    def is_plain(self) -> bool:
        """Nothing but a bias, which takes no registers worth speaking of?"""
        return self.addend is None and self.activation == "none" and self.out_fmt is None

    def arguments(self, n: int) -> dict[str, Any]:
        """The arguments of `finish`, by name, as every kernel passes them on."""
        addend = None if self.addend is None else within_reach(self.addend.reshape(-1, n))
        return {
            "bias_ptr": self.bias,
            "addend_ptr": addend,
            "addend_scale_ptr": self.addend_scale,
            "addend_zero_ptr": self.addend_zero,
            "out_scale_ptr": self.out_scale,
            "out_zero_ptr": self.out_zero,
            "stride_am": 0 if addend is None else addend.stride(0),
            "stride_an": 0 if addend is None else addend.stride(1),
            "ACTIVATION": self.activation,
            "LOW": 0 if self.out_fmt is None else self.out_fmt.qmin,
            "HIGH": 0 if self.out_fmt is None else self.out_fmt.qmax,
        }


def within_reach(x: Tensor) -> Tensor:
    """[M, N] at strides for which offsets inside of a tile fit into 32 bits: else a copy."""
    spans = (min(n, WIDEST) * step for n, step in zip(x.shape, x.stride(), strict=True))
    return x if sum(spans) < 1 << 31 else x.contiguous()


@triton.jit
def finish(
    y,
    y_ptr,
    first_row,
    first_column,
    M,
    N,
    bias_ptr,
    addend_ptr,
    addend_scale_ptr,
    addend_zero_ptr,
    out_scale_ptr,
    out_zero_ptr,
    stride_am,
    stride_an,
    ACTIVATION: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
):
    """Store a tile of float32 results at (first_row, first_column), in int64, of a contiguous y.

    Offsets inside of the tile have 32 bits: of 64 bits they would take more registers than y.
    """
    row = tl.arange(0, y.shape[0])[:, None]
    column = tl.arange(0, y.shape[1])[None, :]
    in_row = column < N - first_column
    mask = (row < M - first_row) & in_row
    if bias_ptr is not None:
        y += tl.load(bias_ptr + first_column + column, mask=in_row, other=0.0).to(tl.float32)
    if addend_ptr is not None:
        first = addend_ptr + first_row * stride_am + first_column * stride_an
        at = row * stride_am + column * stride_an
        addend = tl.load(first + at, mask=mask, other=0.0).to(tl.float32)
        if addend_scale_ptr is not None:
            zero = tl.load(addend_zero_ptr).to(tl.float32)
            addend = (addend - zero) * tl.load(addend_scale_ptr).to(tl.float32)
        y += addend
    y = activate(y, ACTIVATION)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    if out_scale_ptr is not None:
        stored = encode(y, tl.load(out_scale_ptr), tl.load(out_zero_ptr), LOW, HIGH, dtype)
    else:
        stored = narrow(y, dtype)
    first = y_ptr + first_row * N + first_column
    tl.store(first + row * N + column, stored, mask=mask)


@triton.jit
def tile_of(program, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(first row, first column) of a program, in int64: GROUP_M tiles of rows take turns, so that
    the weights of a column tile are read from the L2 cache.
    """
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = program // (GROUP_M * columns)
    first = group * GROUP_M
    size = tl.minimum(rows - first, GROUP_M)
    inside = program % (GROUP_M * columns)
    row, column = first + inside % size, inside // size
    return row.to(tl.int64) * BLOCK_M, column.to(tl.int64) * BLOCK_N
