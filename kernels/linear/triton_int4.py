"""y[m, n] = Σ_g sx[m, g] · sw[n, g] · Σ_{k in g} x[m, k] · w[n, k] + …   int8, int4 × int4 -> int32

The weight's 4-bit codes q are widened to int8 in registers, four at a time in a word:

    w = q · step + low        of a progressive format: integers of each group, one scale sw per row
    w = q - zero              of groups with a scale each: the sum of a group is an int32, which is
                              then multiplied by the scale in float32 (the two steps of MixLLM)

Four codes share the multiplication of 32 bits, and none reaches its neighbor: q · step + low + 128
is in 0 … 255, which is what the protective range of a progressive format is for.  Sums of int32 are
exact.  Activations of 4 bits, two in a byte, are widened to 16 times their codes, which takes a
mask for four of them, and their sums are divided by 16 again: neither changes a bit.  Triton has no
4-bit tensor cores, so that those save bytes of activations, and no time of a multiplication.

Scales leave the sum if there is one per row, for x as for w.  After QServe (arXiv:2405.04532) and
MixLLM (arXiv:2412.14590), as a reconstruction.
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

from mpq_fx.formats import TENSOR, Format, Int
from mpq_fx.kernels.linear.triton_epilogue import finish, tile_of
from mpq_fx.kernels.linear.triton_linear import Call, LinearKernel, Shape, define
from mpq_fx.kernels.linear.triton_split import MANY_ROWS, add_parts, divided, scaled, store_part
from mpq_fx.kernels.quantize.triton import is_packed
from mpq_fx.kernels.tile import Machine, Tile, filling, machine, roomy
from mpq_fx.kernels.triton_packing import in_bytes, pack_bytes, sixteenfold
from mpq_fx.numerics import in_groups, on_grid

NAME = "int4_linear"
# rows up to -> tiles, the largest first: it is taken where it gives every processor a program
TILES = {
    16: (Tile(16, 64, 128, 1, 4, 4), Tile(16, 32, 128, 1, 4, 4)),
    32: (Tile(32, 64, 128, 1, 4, 4), Tile(32, 32, 128, 1, 4, 4)),
    64: (Tile(64, 64, 128, 1, 4, 3), Tile(64, 32, 128, 1, 4, 3)),
    0: (Tile(128, 128, 128, 8, 8, 3), Tile(64, 64, 128, 8, 4, 3)),  # more
}
UNIT = 32  # 4-bit codes in 16 bytes
LARGEST = (1 << 31) - 1  # of an int32 sum


def refuse_formats(x: Format, w: Format) -> Iterator[str]:
    """Why this linear is not one of 4-bit weights and int8 or int4 activations."""
    group = w.progressive.block if w.progressive else w.block
    if (w.element != Int(4) and not w.progressive) or w.block == TENSOR:
        yield f"weights have codes of 4 bits here, with scales of rows or groups, not {w}"
    elif group > 0 and group % UNIT:
        yield f"groups are multiples of {UNIT} here, and those of {w} are {group}"
    if x.element not in (Int(8), Int(4)) or not x.symmetric:
        yield f"activations are int8 or int4 without a zero point here, not {x}"
    elif x.block > 0 and x.block % UNIT:
        yield f"groups are multiples of {UNIT} here, and those of {x} are {x.block}"


def refuse_shape(shape: Shape) -> Iterator[str]:
    """Where a sum does not fit; that of a group does."""
    x, w = shape.x_fmt, shape.w_fmt
    if max(x.block, w.block) <= 0 and shape.k * 127 * 128 > LARGEST:
        yield f"int32 sums of {shape.k} products of {x} and {w} may overflow"


def pack(w: Tensor, scale: Tensor, zero: Tensor, fmt: Format) -> tuple[Tensor, ...]:
    """(words, scales [groups, N], 128 + low [groups, N] as uint8, steps [groups, N] as uint8)

    The last two of a symmetric format are left out, as are the steps of one without second level.
    """
    scales = scale.t().clone(memory_format=torch.contiguous_format)
    if fmt.progressive is None:
        words = pack_bytes(w + 8)
        if fmt.symmetric:
            return words, scales
        return (
            words,
            scales,
            (120 - zero.t()).to(torch.uint8, memory_format=torch.contiguous_format),
        )
    q, step, low = on_grid(in_groups(w.int(), fmt.progressive), fmt.progressive)
    words = pack_bytes(q.flatten(1)[:, : w.shape[1]].to(torch.int8))
    second = (part.squeeze(-1).t().to(torch.uint8) for part in (low + 128, step))
    return words, scales, *(part.contiguous() for part in second)


def tile(m: int, n: int, k: int, fmt: Format, at: Machine) -> Tile:
    """By the table: its K within a group, and split until the device is full."""
    return divided(filling(listed(m, fmt, at), at, m, n), m, n, k, at)


def listed(m: int, fmt: Format, at: Machine) -> tuple[Tile, ...]:
    """The tiles of the table for so many rows that a group and a block's shared memory can hold."""
    rows = next((rows for rows in TILES if m <= rows), 0)
    found = (within_groups(tile, group_of(fmt)) for tile in TILES[rows])
    return tuple(tile for tile in found if shared_bytes(tile) <= at.shared)


def group_of(fmt: Format) -> int:
    """Values along K that are widened alike; 0: the whole row."""
    return fmt.progressive.block if fmt.progressive else max(fmt.block, 0)


def within_groups(tile: Tile, *groups: int) -> Tile:
    """A step of it has one scale of each kind."""
    return replace(tile, block_k=math.gcd(tile.block_k, *groups))


def shared_bytes(tile: Tile) -> float:
    """Loads on their way, and the weights of a step once more where tensor cores read them."""
    return tile.shared_bytes(1, 0.5) + tile.block_n * tile.block_k


@triton.jit
def weight_of(words, low_ptr, step_ptr, at):
    """int8 [32 U, N] of a group's words [N, U, 4]; `at`: where its steps and lowest values are"""
    low = 120  # 128 less the half that codes are stored with
    if low_ptr is not None:
        low = tl.load(low_ptr + at).to(tl.int32)[:, None, None]
    step = 1
    if step_ptr is not None:
        step = tl.load(step_ptr + at).to(tl.int32)[:, None, None]
    return tl.trans(in_bytes(words, step, low))


@triton.jit
def added(acc, x, w, x_scale_ptr, x_at, scale_ptr, at):
    """acc + x · w; with the scales of a group in float32, or of int32 sums without"""
    if x_scale_ptr is None and scale_ptr is None:
        acc = tl.dot(x, w, acc, out_dtype=tl.int32)
    else:
        total = tl.dot(x, w, out_dtype=tl.int32).to(tl.float32)
        if scale_ptr is not None:
            total *= tl.load(scale_ptr + at).to(tl.float32)[None, :]
        if x_scale_ptr is not None:
            total *= tl.load(x_scale_ptr + x_at).to(tl.float32)[:, None]
        acc += total
    return acc


@triton.jit
def int4_kernel(
    x_ptr, x_scale_ptr, words_ptr, scale_ptr, low_ptr, step_ptr, y_ptr,
    bias_ptr, addend_ptr, addend_scale_ptr, addend_zero_ptr, out_scale_ptr, out_zero_ptr,
    M, N, K, steps, stride_xm, stride_xk, stride_am, stride_an,
    ACTIVATION: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    STRIDE_S: tl.constexpr, X_GROUP: tl.constexpr, GROUP: tl.constexpr, HAS_SCALES: tl.constexpr,
    PACKED: tl.constexpr, IS_WHOLE: tl.constexpr, IS_EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """A tile of y, or (not IS_WHOLE) of its share of `steps` steps along K, without row scales.

    Groups of x, or those of w (HAS_SCALES), have scales of their own, or the sum over K stays an
    int32.
    """
    IN_FLOATS: tl.constexpr = HAS_SCALES or X_GROUP > 0
    inner_x_scale_ptr = x_scale_ptr if X_GROUP else None
    inner_scale_ptr = scale_ptr if HAS_SCALES else None
    outer_x_scale_ptr = None if X_GROUP else x_scale_ptr
    outer_scale_ptr = None if HAS_SCALES else scale_ptr
    UNITS: tl.constexpr = BLOCK_K // 32
    first_row, first_column = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    # Rows and columns past the end read those of the beginning, and are not stored.
    row = (first_row + tl.arange(0, BLOCK_M)) % M
    column = (first_column + tl.arange(0, BLOCK_N)) % N
    k, unit = tl.arange(0, BLOCK_K), tl.arange(0, UNITS)[None, :, None]
    first = tl.program_id(1) * steps
    word = tl.arange(0, 4)[None, None, :]
    stride_xk = tl.cast(stride_xk, tl.int64)
    if PACKED:
        x_at = x_ptr + row[:, None, None] * stride_xm + (first * UNITS + unit) * 4 + word
    else:
        x_at = x_ptr + row[:, None] * stride_xm + (first * BLOCK_K + k) * stride_xk
    words_at = words_ptr + (first * UNITS + unit).to(tl.int64) * N * 4
    words_at += column[:, None, None] * 4 + word
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32 if IN_FLOATS else tl.int32)
    for number in range(first, tl.minimum(first + steps, tl.cdiv(K, BLOCK_K))):
        start = number * BLOCK_K
        words = tl.load(words_at, mask=unit * 32 < K - start, other=0)
        if PACKED:
            x = sixteenfold(tl.load(x_at, mask=unit * 32 < K - start, other=0))
        else:
            x = tl.load(x_at) if IS_EVEN else tl.load(x_at, mask=k < K - start, other=0)
        group = (start // GROUP if GROUP else 0) * N + column
        x_group = row * STRIDE_S + (start // X_GROUP if X_GROUP else 0)
        w = weight_of(words, low_ptr, step_ptr, group)
        acc = added(acc, x, w, inner_x_scale_ptr, x_group, inner_scale_ptr, group)
        x_at += UNITS * 4 if PACKED else BLOCK_K * stride_xk
        words_at += UNITS * N * 4
    if PACKED:
        acc = acc * 0.0625 if IN_FLOATS else acc >> 4
    if IS_WHOLE:
        at = (first_row, first_column, M, N)
        y = scaled(acc, outer_x_scale_ptr, outer_scale_ptr, *at, STRIDE_S)
        after = (addend_ptr, addend_scale_ptr, addend_zero_ptr, out_scale_ptr, out_zero_ptr)
        finish(y, y_ptr, *at, bias_ptr, *after, stride_am, stride_an, ACTIVATION, LOW, HIGH)
    else:
        store_part(acc, y_ptr, tl.program_id(1), first_row, first_column, M, N)


def configurations(m: int, n: int, k: int, at: Machine) -> tuple[Tile, ...]:
    """What a search tries for so many rows: other widths, warps and splits than the table's."""
    found = []
    for tile in TILES[next((rows for rows in TILES if m <= rows), 0)]:
        for width in (tile.block_n, tile.block_n * 2):
            for split in (1, 2, 4, 8) if m <= MANY_ROWS else (1,):
                for warps in (4, 8):
                    found.append(replace(tile, block_n=width, warps=warps, split_k=split))
    kept = roomy(tuple(dict.fromkeys(found)))  # any other spills: a weight is widened in registers
    return tuple(t for t in kept if shared_bytes(t) <= at.shared)


def launch(call: Call) -> Tensor:
    """One program per tile of results and share of K; then, of a split K, one sum."""
    y, fmt, groups = call.empty(), call.w_fmt, max(call.x_fmt.block, 0)
    words, scale, low, step = (*call.packed, None, None)[:4]
    x, (m, k), n = words_of(call), (len(call.x), call.k), call.n
    has_scales = fmt.block > 0
    cut = call.tile or tile(m, n, k, fmt, machine(x.device))
    cut = within_groups(cut, group_of(fmt), groups)
    is_whole = cut.split_k == 1
    kind = torch.float32 if has_scales or groups else torch.int32
    out = y if is_whole else x.new_empty((cut.split_k, m, n), dtype=kind)
    grid = (triton.cdiv(m, cut.block_m) * triton.cdiv(n, cut.block_n), cut.split_k)
    int4_kernel[grid](
        *(x, call.x_scale, words, scale, low, step, out),
        M=m,
        N=n,
        K=k,
        steps=triton.cdiv(triton.cdiv(k, cut.block_k), cut.split_k),
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        STRIDE_S=0 if call.x_fmt.block == TENSOR else call.x_fmt.groups(k),
        X_GROUP=groups,
        GROUP=group_of(fmt),
        HAS_SCALES=has_scales,
        PACKED=is_packed(call.x_fmt),
        IS_WHOLE=is_whole,
        IS_EVEN=k % cut.block_k == 0,
        BLOCK_M=cut.block_m,
        BLOCK_N=cut.block_n,
        BLOCK_K=cut.block_k,
        GROUP_M=cut.group_m,
        num_warps=cut.warps,
        num_stages=cut.stages,
        **call.epilogue.arguments(n),
    )
    if not is_whole:
        left = (None if groups else call.x_scale), (None if has_scales else scale)
        add_parts(out, y, call.epilogue, *left)
    return y


def words_of(call: Call) -> Tensor:
    """The activation: codes, or words that hold eight of them; rows begin at 16 bytes."""
    if not is_packed(call.x_fmt):
        return call.x
    return call.x.contiguous().flatten().view(torch.int32).view(len(call.x), call.k // 8)


INT4 = define(LinearKernel(NAME, refuse_formats, refuse_shape, pack, launch, configurations))
