"""y[m, n] = Σ_k x[m, k] · (w[n, k] - zw[n, g]) · sw[n, g] + …,   g = k // block

Weights alone, in integers or 8-bit floats, widened in registers.  x has the dtype of its format
(bfloat16, float16 or float32); a code minus its zero point is a whole number of at most 9 bits or
such a float, and exact in each of them, so that GPUs without 8-bit floats run those as well.
Products are summed in float32 over a group, and the sum is multiplied by the group's scale in
float32: no scaled weight is ever rounded.  One scale per row multiplies the whole sum.

1 … 4 rows    a multiply and a sum along K on the vector units, which read the weight once
… 64 rows     tensor cores, K split over programs, so that few tiles still fill a device
more          tensor cores, large tiles

All three read one packed copy of the weight (`triton_packing`).  After MARLIN (arXiv:2408.11743)
and gemlite, as a reconstruction: layout and widening are made for Triton.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# A kernel has options besides its arguments, and constants are not what they are annotated as.

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from mpq_fx.formats import TENSOR, Float, Format, Int
from mpq_fx.kernels.linear.triton_epilogue import finish, tile_of
from mpq_fx.kernels.linear.triton_linear import Call, LinearKernel, Shape, define
from mpq_fx.kernels.linear.triton_split import MANY_ROWS, add_parts, divided, scaled, store_part
from mpq_fx.kernels.tile import Machine, Tile, filling, machine, roomy
from mpq_fx.kernels.triton_packing import pack_codes, unit_of, value_at, widened

NAME = "weight_only_linear"
FEW_ROWS = 4  # up to here without tensor cores, whose smallest tile has 16 rows
# rows up to -> tiles, the largest first: it is taken where it gives every processor a program
TILES = {
    1: (Tile(1, 32, 512, 1, 8, 1), Tile(1, 16, 512, 1, 8, 1)),
    2: (Tile(2, 16, 256, 1, 4, 1),),
    4: (Tile(4, 32, 128, 1, 4, 1),),
    16: (Tile(16, 64, 128, 1, 8, 3), Tile(16, 32, 128, 1, 4, 3)),
    32: (Tile(32, 64, 128, 1, 4, 3), Tile(32, 32, 128, 1, 4, 3)),
    64: (Tile(64, 64, 128, 1, 4, 3), Tile(64, 32, 128, 1, 4, 3)),
    0: (Tile(128, 128, 64, 8, 8, 3), Tile(64, 64, 64, 8, 4, 4)),  # more
}
FLOAT8S = (torch.float8_e4m3fn, torch.float8_e5m2)
FLOATS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def refuse_formats(x: Format, w: Format) -> Iterator[str]:
    """Why this linear is not one of weights alone."""
    is_signed = isinstance(w.element, Int) and w.element.signed
    if not is_signed and w.dtype not in FLOAT8S:
        yield f"weights are signed integers or 8-bit floats here, not {w}"
    if w.progressive:
        yield f"codes of {w} are stored in two levels"
    if w.block > 0 and w.block % 16:
        yield f"groups are multiples of 16 here, and those of {w} are {w.block}"
    if x.scale is not None or x.dtype not in FLOATS:
        yield f"activations are bfloat16, float16 or float32 here, not {x}"


def refuse_shape(shape: Shape) -> Iterator[str]:
    """Every size has a tile."""
    yield from ()


def pack(w: Tensor, scale: Tensor, zero: Tensor, fmt: Format) -> tuple[Tensor, ...]:
    """(words, scales [groups, N], zero points [groups, N] as int8 unless they are all 0)"""
    words = pack_codes(w, fmt.stored_bits)
    scales = (scale.expand(w.shape[0], 1) if fmt.block == TENSOR else scale).t()
    if fmt.symmetric:
        return words, scales.clone(memory_format=torch.contiguous_format)
    zeros = (zero.expand(w.shape[0], 1) if fmt.block == TENSOR else zero).t().to(torch.int8)
    return words, *(part.clone(memory_format=torch.contiguous_format) for part in (scales, zeros))


def tile(m: int, n: int, k: int, fmt: Format, at: Machine) -> Tile:
    """By the table: its K within a group, and split until the device is full."""
    return divided(filling(listed(m, fmt, at), at, m, n), m, n, k, at)


def listed(m: int, fmt: Format, at: Machine) -> tuple[Tile, ...]:
    """The tiles of the table for so many rows that a group and a block's shared memory can hold."""
    rows = next((rows for rows in TILES if m <= rows), 0)
    found = TILES[rows]
    if 0 < rows <= FEW_ROWS:  # of as many bytes of the weight, whatever the bits of a code
        found = tuple(replace(t, block_k=t.block_k * 4 // fmt.stored_bits) for t in found)
    found = tuple(within_group(t, fmt) for t in found)
    return tuple(t for t in found if shared_bytes(t, fmt) <= at.shared)


def within_group(tile: Tile, fmt: Format) -> Tile:
    """A step of the tensor cores has one scale, and is at least as long as the codes in 16 bytes,
    which may then have two.  Where a short one leaves threads idle, few rows take fewer warps.
    """
    unit = unit_of(fmt.stored_bits)
    if tile.block_m <= FEW_ROWS or fmt.block <= 0:
        return tile
    length = max(math.gcd(fmt.block, tile.block_k), unit)
    loads = tile.block_n * length // unit
    warps = max(1, min(tile.warps, loads // 32)) if tile.block_m <= 32 else tile.warps
    return replace(tile, block_k=length, warps=warps)


def shared_bytes(tile: Tile, fmt: Format) -> float:
    """Loads on their way, and the weights of a step once more where tensor cores read them."""
    widened = tile.block_n * tile.block_k * 2
    return tile.shared_bytes(2, fmt.stored_bits / 8) + widened


@triton.jit
def gemm_kernel(
    x_ptr, words_ptr, scale_ptr, zero_ptr, y_ptr,
    bias_ptr, addend_ptr, addend_scale_ptr, addend_zero_ptr, out_scale_ptr, out_zero_ptr,
    M, N, K, steps, stride_xm, stride_xk, stride_am, stride_an,
    ACTIVATION: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    BITS: tl.constexpr, MANTISSA: tl.constexpr, GROUP: tl.constexpr, IS_WHOLE: tl.constexpr,
    IS_EVEN: tl.constexpr, OPERAND: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """A tile of y, or (not IS_WHOLE) of its share of `steps` steps along K, in float32.

    OPERAND is the dtype of x, but for the interpreter: numpy has no bfloat16, and multiplies the
    same numbers in float32.  A unit of 16 bytes has PARTS scales; two, if a tile is one unit long.
    """
    UNIT: tl.constexpr = 128 // BITS
    UNITS: tl.constexpr = BLOCK_K // UNIT
    PLACES: tl.constexpr = 32 // BITS // PARTS
    SOME_K: tl.constexpr = BLOCK_K // PARTS
    first_row, first_column = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    # Rows and columns past the end read those of the beginning, and are not stored.
    row = (first_row + tl.arange(0, BLOCK_M)) % M
    column = (first_column + tl.arange(0, BLOCK_N)) % N
    k, unit = tl.arange(0, SOME_K), tl.arange(0, UNITS)[None, :, None]
    first = tl.program_id(1) * steps
    stride_xk = tl.cast(stride_xk, tl.int64)
    x_at = x_ptr + row[:, None] * stride_xm + (first * BLOCK_K + k) * stride_xk
    at = column[:, None, None] * 4 + tl.arange(0, 4)[None, None, :]
    words_at = words_ptr + (first * UNITS + unit).to(tl.int64) * N * 4 + at
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(first, tl.minimum(first + steps, tl.cdiv(K, BLOCK_K))):
        words = tl.load(words_at, mask=unit * UNIT < K - step * BLOCK_K, other=0)
        for part in tl.static_range(PARTS):
            start = step * BLOCK_K + part * SOME_K
            if IS_EVEN:
                x = tl.load(x_at + part * SOME_K * stride_xk)
            else:
                x = tl.load(x_at + part * SOME_K * stride_xk, mask=k < K - start, other=0.0)
            group = tl.minimum(start, K - 1) // GROUP if GROUP else 0
            zero = 0.0
            if zero_ptr is not None:
                zero = tl.load(zero_ptr + group * N + column).to(tl.float32)[:, None, None]
            w = widened(words, zero, part * PLACES, PLACES, BITS, MANTISSA)
            w = tl.trans(w.to(OPERAND))
            if GROUP:
                total = tl.dot(x.to(OPERAND), w, input_precision="ieee")
                acc += total * tl.load(scale_ptr + group * N + column).to(tl.float32)[None, :]
            else:
                acc = tl.dot(x.to(OPERAND), w, acc, input_precision="ieee")
        x_at += BLOCK_K * stride_xk
        words_at += UNITS * N * 4
    if IS_WHOLE:
        at = (first_row, first_column, M, N)
        acc = scaled(acc, None, None if GROUP else scale_ptr, *at, 0)
        after = (addend_ptr, addend_scale_ptr, addend_zero_ptr, out_scale_ptr, out_zero_ptr)
        finish(acc, y_ptr, *at, bias_ptr, *after, stride_am, stride_an, ACTIVATION, LOW, HIGH)
    else:
        store_part(acc, y_ptr, tl.program_id(1), first_row, first_column, M, N)


@triton.jit
def gemv_kernel(
    x_ptr, words_ptr, scale_ptr, zero_ptr, y_ptr,
    bias_ptr, addend_ptr, addend_scale_ptr, addend_zero_ptr, out_scale_ptr, out_zero_ptr,
    M, N, K, steps, stride_xm, stride_xk, stride_am, stride_an,
    ACTIVATION: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    BITS: tl.constexpr, MANTISSA: tl.constexpr, GROUP: tl.constexpr, IS_WHOLE: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The same with sums of float32 products.  A unit of 16 bytes has PARTS scales.

    Outputs run along the threads of a warp, which then all read the same activations.
    """
    UNIT: tl.constexpr = 128 // BITS
    UNITS: tl.constexpr = BLOCK_K // UNIT
    PLACES: tl.constexpr = 32 // BITS // PARTS
    first_row = tl.program_id(2).to(tl.int64) * BLOCK_M
    first_column = tl.program_id(0).to(tl.int64) * BLOCK_N
    row = ((first_row + tl.arange(0, BLOCK_M)) % M)[:, None, None, None]
    column = ((first_column + tl.arange(0, BLOCK_N)) % N)[None, None, :, None]
    lane = tl.arange(0, 4)[None, None, None, :]
    first = tl.program_id(1) * steps
    acc = tl.zeros((BLOCK_M, UNITS, BLOCK_N, 4), tl.float32)
    for step in range(first, tl.minimum(first + steps, tl.cdiv(K, BLOCK_K))):
        unit = (step * UNITS + tl.arange(0, UNITS))[None, :, None, None]
        at = (unit.to(tl.int64) * N + column) * 4 + lane
        words = tl.load(words_ptr + at, mask=unit * UNIT < K, other=0)
        for part in tl.static_range(PARTS):
            start = unit * UNIT + part * (UNIT // PARTS)
            group = start // GROUP if GROUP else unit * 0
            zero = 0.0
            if zero_ptr is not None:
                zero = tl.load(zero_ptr + group * N + column, mask=start < K, other=0)
                zero = zero.to(tl.float32)
            total = tl.zeros((BLOCK_M, UNITS, BLOCK_N, 4), tl.float32)
            for place in tl.static_range(part * PLACES, (part + 1) * PLACES):
                k = unit * UNIT + 4 * place + lane
                at = row * stride_xm + k.to(tl.int64) * stride_xk
                x = tl.load(x_ptr + at, mask=k < K, other=0.0).to(tl.float32)
                total += x * value_at(words, zero, place, BITS, MANTISSA)
            if GROUP:
                scale = tl.load(scale_ptr + group * N + column, mask=start < K, other=0.0)
                total *= scale.to(tl.float32)
            acc += total
    y = tl.sum(tl.sum(acc, axis=3), axis=1)
    if IS_WHOLE:
        at = (first_row, first_column, M, N)
        y = scaled(y, None, None if GROUP else scale_ptr, *at, 0)
        after = (addend_ptr, addend_scale_ptr, addend_zero_ptr, out_scale_ptr, out_zero_ptr)
        finish(y, y_ptr, *at, bias_ptr, *after, stride_am, stride_an, ACTIVATION, LOW, HIGH)
    else:
        store_part(y, y_ptr, tl.program_id(1), first_row, first_column, M, N)


def configurations(m: int, n: int, k: int, at: Machine) -> tuple[Tile, ...]:
    """What a search tries for so many rows: other widths, warps and splits than the table's."""
    found = []
    for tile in TILES[next((rows for rows in TILES if m <= rows), 0)]:
        for n_factor in (1, 2):
            for split in (1, 2, 4, 8) if m <= MANY_ROWS else (1,):
                for warps in (4, 8):
                    width = tile.block_n * n_factor
                    found.append(replace(tile, block_n=width, warps=warps, split_k=split))
    return roomy(tuple(dict.fromkeys(found)))  # any other spills: a weight is widened in registers


def launch(call: Call) -> Tensor:
    """One program per tile of results and share of K; then, of a split K, one sum."""
    y, x, fmt = call.empty(), call.x.to(call.x_fmt.dtype), call.w_fmt
    words, scale, zero = (*call.packed, None)[:3]
    (m, k), n = x.shape, call.n
    cut = within_group(call.tile or tile(m, n, k, fmt, machine(x.device)), fmt)
    steps, is_whole = triton.cdiv(triton.cdiv(k, cut.block_k), cut.split_k), cut.split_k == 1
    out = y if is_whole else x.new_empty((cut.split_k, m, n), dtype=torch.float32)
    group, after = max(fmt.block, 0), call.epilogue.arguments(n)
    constants = {
        "BITS": fmt.stored_bits,
        "MANTISSA": fmt.element.man if isinstance(fmt.element, Float) else 0,
        "GROUP": group,
        "PARTS": 2 if group % unit_of(fmt.stored_bits) else 1,
        "IS_WHOLE": is_whole,
        "BLOCK_M": cut.block_m,
        "BLOCK_N": cut.block_n,
        "BLOCK_K": cut.block_k,
        "num_warps": cut.warps,
        "num_stages": cut.stages,
    }
    sizes = (x, words, scale, zero, out), {"M": m, "N": n, "K": k, "steps": steps}
    strides = {"stride_xm": x.stride(0), "stride_xk": x.stride(1)}
    tiles = triton.cdiv(m, cut.block_m), triton.cdiv(n, cut.block_n)
    if cut.block_m <= FEW_ROWS:
        grid = (tiles[1], cut.split_k, tiles[0])
        gemv_kernel[grid](*sizes[0], **sizes[1], **strides, **constants, **after)
    else:
        operand = tl.float32 if knobs.runtime.interpret else FLOATS[x.dtype]
        constants |= {"OPERAND": operand, "GROUP_M": cut.group_m, "IS_EVEN": k % cut.block_k == 0}
        grid = (tiles[0] * tiles[1], cut.split_k)
        gemm_kernel[grid](*sizes[0], **sizes[1], **strides, **constants, **after)
    if not is_whole:
        add_parts(out, y, call.epilogue, w_scale=None if group else scale)
    return y


WEIGHT_ONLY = define(LinearKernel(NAME, refuse_formats, refuse_shape, pack, launch, configurations))
