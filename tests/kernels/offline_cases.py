"""Launches that are compiled offline: the main tiles of each kernel, on a layer of Llama-3-8B."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from mpq_fx.formats import FORMATS, TENSOR
from mpq_fx.kernels.embedding import triton as triton_embedding
from mpq_fx.kernels.linear import triton_int4_int8, triton_split, triton_weight_only
from mpq_fx.kernels.linear.triton_epilogue import Epilogue
from mpq_fx.kernels.linear.triton_linear import Call
from mpq_fx.kernels.tile import Machine

N, K = 4096, 4096


def meta(*shape: int, dtype: torch.dtype | None) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def linear(kernel, m: int, weight: str, activation: str, machine: Machine) -> None:
    """A linear in bfloat16 with a bias."""
    x_fmt, w_fmt = FORMATS[activation], FORMATS[weight]
    scales = w_fmt.scale_shape((N, K))
    packed = kernel.pack(
        meta(N, K, dtype=w_fmt.dtype),
        meta(*scales, dtype=w_fmt.scale),
        meta(*scales, dtype=torch.int32),
        w_fmt,
    )
    tile = kernel.tile(m, N, K, w_fmt, machine)
    x, bias = meta(m, K, dtype=x_fmt.dtype), meta(N, dtype=torch.float32)
    x_scale = None
    if x_fmt.scale is not None:
        x_scale = meta(1 if x_fmt.block == TENSOR else m, dtype=torch.float32)
    after = Epilogue(torch.bfloat16, bias)
    kernel.launch(Call(x, x_scale, None, packed, x_fmt, w_fmt, N, after, tile))


def split(kind: torch.dtype, machine: Machine) -> None:
    """The sum of four parts."""
    parts, y = meta(4, 16, N, dtype=kind), meta(16, N, dtype=torch.bfloat16)
    scales = meta(16, dtype=torch.float32), meta(N, dtype=torch.float32)
    triton_split.add_parts(parts, y, Epilogue(torch.bfloat16), *scales)


def embedding(weight: str, machine: Machine) -> None:
    """A table of 128256 rows."""
    fmt, rows = FORMATS[weight], 128256
    scales = meta(*fmt.scale_shape((rows, K)), dtype=fmt.scale)
    stored = meta(rows, K * fmt.element.bits // 8, dtype=torch.int8)
    indices = meta(1, 64, dtype=torch.int64)
    triton_embedding.launch(indices, stored, scales, None, K, fmt, torch.bfloat16)


WEIGHT_ONLY = {
    "int4": (1, 2, 4, 16, 64, 1024),
    "int8": (1, 4, 16, 1024),
    "int4_asym": (1, 16),
    "int4_g32": (16, 1024),
}
INT4_INT8 = {"int4_progressive": (1, 64, 1024), "int4": (1, 1024), "int4_asym": (1024,)}
CASES = {
    **{
        f"weight_only {fmt} {m}": partial(linear, triton_weight_only, m, fmt, "bfloat16")
        for fmt, rows in WEIGHT_ONLY.items()
        for m in rows
    },
    **{
        f"int4_int8 {fmt} {m}": partial(linear, triton_int4_int8, m, fmt, "int8")
        for fmt, rows in INT4_INT8.items()
        for m in rows
    },
    "split float32": partial(split, torch.float32),
    "split int32": partial(split, torch.int32),
    **{f"embedding {fmt}": partial(embedding, fmt) for fmt in ("int8", "int4_g32")},
}
