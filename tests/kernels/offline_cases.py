"""Launches that are compiled offline: the main tiles of each kernel, on a layer of Llama-3-8B."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from mpq_fx.formats import FORMATS
from mpq_fx.kernels.embedding import triton as triton_embedding
from mpq_fx.kernels.linear import triton_int4, triton_split, triton_weight_only
from mpq_fx.kernels.linear.triton_epilogue import Epilogue
from mpq_fx.kernels.linear.triton_linear import Call
from mpq_fx.kernels.quantize.triton import stored
from mpq_fx.kernels.tile import Machine, Tile

N, K = 4096, 4096


def meta(*shape: int, dtype: torch.dtype | None) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def linear(
    kernel, number: int, rows: int, weight: str, activation: str, is_full: bool, at: Machine
) -> None:
    """A tile of the table, by its number there; full: with all that may follow a linear."""
    w_fmt, m = FORMATS[weight], rows or 1024
    after = everything(m) if is_full else Epilogue(torch.bfloat16, meta(N, dtype=torch.float32))
    tile = kernel.listed(m, w_fmt, at)[number]
    launch(kernel, (m, N, K), weight, activation, after, tile)


def ragged(kernel, m: int, weight: str, activation: str, at: Machine) -> None:
    """Sizes that no tile divides, nor 16."""
    n, k = 1001, 1003
    tile = kernel.tile(m, n, k, FORMATS[weight], at)
    launch(kernel, (m, n, k), weight, activation, Epilogue(torch.float32), tile)


def launch(
    kernel, sizes: tuple[int, int, int], weight: str, activation: str, after: Epilogue, tile: Tile
) -> None:
    (m, n, k), x_fmt, w_fmt = sizes, FORMATS[activation], FORMATS[weight]
    scales = w_fmt.scale_shape((n, k))
    packed = kernel.pack(
        meta(n, k, dtype=w_fmt.dtype),
        meta(*scales, dtype=w_fmt.scale),
        meta(*scales, dtype=torch.int32),
        w_fmt,
    )
    x_scale = None
    if x_fmt.scale is not None:
        x_scale = meta(math.prod(x_fmt.scale_shape((m, k))), dtype=x_fmt.scale)
    x = stored(meta(m, k, dtype=x_fmt.dtype), x_fmt)
    kernel.launch(Call(x, x_scale, None, packed, x_fmt, w_fmt, n, after, tile))


def everything(m: int) -> Epilogue:
    """A bias, a residual, an activation, and codes for the next site."""
    added = meta(m, N, dtype=torch.bfloat16), None, None
    codes = FORMATS["uint8_tensor"], meta(dtype=torch.float32), meta(dtype=torch.int32)
    return Epilogue(torch.bfloat16, meta(N, dtype=torch.float32), *added, "gelu", *codes)


def linears(kernel, weight: str, activation: str, rows: tuple[int, ...] | None = None):
    """name -> case, of all tiles for these numbers of rows, or of all."""
    return {
        f"{kernel.NAME} {weight}*{activation} {m or 'more'} {number}": partial(
            linear, kernel, number, m, weight, activation, False
        )
        for m in rows or kernel.TILES
        for number in range(len(kernel.TILES[m]))
    }


def full(kernel, weight: str, activation: str):
    """The largest tile that a linear with everything behind it takes."""
    name = f"{kernel.NAME} {weight}*{activation} more full"
    return {name: partial(linear, kernel, 0, 0, weight, activation, True)}


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


EVERYWHERE = {
    **linears(triton_weight_only, "int4", "bfloat16", (1, 16, 0)),
    **linears(triton_int4, "int4_progressive", "int8", (16, 0)),
    **full(triton_weight_only, "int4_asym", "bfloat16"),
}
ON_SOME = {  # one architecture of each kind of tensor core
    **linears(triton_weight_only, "int4_asym", "bfloat16", (2, 4, 32, 64)),
    **linears(triton_int4, "int4_progressive", "int8", (64,)),
    **linears(triton_weight_only, "int8", "bfloat16", (1,)),
    **linears(triton_weight_only, "int4_g32", "float16", (16, 0)),
    **linears(triton_weight_only, "fp8_e4m3", "bfloat16", (1, 16)),
    **full(triton_weight_only, "int8", "bfloat16"),
    **linears(triton_int4, "int4", "int4_row", (16,)),
    **linears(triton_int4, "int4", "int4", (0,)),
    **full(triton_int4, "int4_asym", "int8"),
    **full(triton_int4, "int4", "int4"),
    "ragged 1": partial(ragged, triton_weight_only, 1, "int4_asym", "bfloat16"),
    "ragged 17": partial(ragged, triton_weight_only, 17, "int4_asym", "bfloat16"),
    "ragged 17 int8": partial(ragged, triton_int4, 17, "int4_asym", "int8"),
    "split float32": partial(split, torch.float32),
    "split int32": partial(split, torch.int32),
    **{f"embedding {fmt}": partial(embedding, fmt) for fmt in ("int8", "int4_g32")},
}
