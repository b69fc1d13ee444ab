"""y[m, n] = Σ_s parts[s, m, n], times the scales that are left, and what follows a linear

The second kernel of a linear whose K is split over programs.  Each of them has written its sums to
a place of its own, and they are added in the order of s.  Not by atomic additions: they arrive in
another order on every call, on which a sum of floats depends, and they would need a buffer of zeros
first.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mpq_fx.kernels.linear.triton_epilogue import Epilogue, finish

BLOCK = 256


@triton.jit
def scaled(y, x_scale_ptr, w_scale_ptr, m, n, M, N, STRIDE_S: tl.constexpr):
    """A whole sum times the scale of the activation's row, and then of the weight's, if given."""
    y = y.to(tl.float32)
    if x_scale_ptr is not None:
        y *= tl.load(x_scale_ptr + m * STRIDE_S, mask=m < M, other=0.0).to(tl.float32)
    if w_scale_ptr is not None:
        y *= tl.load(w_scale_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    return y


@triton.jit
def reduce_kernel(
    parts_ptr, x_scale_ptr, w_scale_ptr, y_ptr,
    bias_ptr, addend_ptr, addend_scale_ptr, addend_zero_ptr, out_scale_ptr, out_zero_ptr,
    M, N, stride_am, stride_an,
    ACTIVATION: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    STRIDE_S: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64)
    n = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[None, :]
    y = tl.zeros((1, BLOCK), parts_ptr.dtype.element_ty)
    for part in tl.static_range(SPLIT):
        y += tl.load(parts_ptr + (m + part * M) * N + n, mask=n < N, other=0)
    y = scaled(y, x_scale_ptr, w_scale_ptr, m, n, M, N, STRIDE_S)
    after = (addend_ptr, addend_scale_ptr, addend_zero_ptr, out_scale_ptr, out_zero_ptr)
    y = finish(y, m, n, M, N, bias_ptr, *after, stride_am, stride_an, ACTIVATION, LOW, HIGH)
    tl.store(y_ptr + m * N + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


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
