"""Launches that are compiled offline: the main tile of each kernel, on sizes of real models."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from mpq_fx.formats import FORMATS
from mpq_fx.kernels.linear import triton_weight_only
from mpq_fx.kernels.linear.triton_epilogue import Epilogue
from mpq_fx.kernels.linear.triton_linear import Call
from mpq_fx.kernels.tile import Machine

K, N = 4096, 4096


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def weight_only(m: int, weight: str, machine: Machine, activation: str = "bfloat16") -> None:
    """A linear of Llama-3-8B with weights alone in integers."""
    x_fmt, w_fmt = FORMATS[activation], FORMATS[weight]
    scales = w_fmt.scale_shape((N, K))
    packed = triton_weight_only.pack(
        meta(N, K, dtype=w_fmt.dtype),
        meta(*scales, dtype=w_fmt.scale or torch.float32),
        meta(*scales, dtype=torch.int32),
        w_fmt,
    )
    tile = triton_weight_only.tile(m, N, K, w_fmt, machine)
    x, after = meta(m, K, dtype=x_fmt.dtype), Epilogue(x_fmt.dtype, meta(N, dtype=torch.float32))
    triton_weight_only.launch(Call(x, None, None, packed, x_fmt, w_fmt, N, after, tile))


CASES = {
    f"weight_only {fmt} {m}": (triton_weight_only, partial(weight_only, m, fmt))
    for fmt, rows in {
        "int4": (1, 2, 4, 16, 32, 64, 1024),
        "int8": (1, 4, 16, 64, 1024),
        "int4_asym": (1, 16),
        "int4_g32": (1, 16, 1024),
    }.items()
    for m in rows
}
