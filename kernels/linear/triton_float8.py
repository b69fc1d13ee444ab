"""y[m, n] = sx[m] · sw[n] · Σ_k x[m, k] · w[n, k] + …   8-bit floats, summed in float32

How exact that sum is depends on the tensor core.  Up to sm_90 it keeps 13 bits of a running sum's
mantissa (SageAttention2, arXiv:2411.10958, calls it FP22; DeepSeek-V3, arXiv:2412.19437, counts
14): each instruction cuts off what lies below, always toward zero, so that the error grows with the
K / 32 instructions of a sum.  There the tensor core sums one BLOCK_K at a time, and that is added
in float32 (PROMOTE), as torch._scaled_mm does without its fast accumulation.  So, with
2^-13 for the roundoff of a tensor core's sum,

    relative RMS error of the sum  <=  sqrt(min(K, BLOCK_K)) · 2^-13  +  sqrt(K) · 2^-24

sm_100 keeps float32 sums beside its tensor cores, which such a detour would only slow down.  Of
sm_120 nothing is published; it is taken for one of the former.  In tiles of fewer than 64 rows
Triton 3.7 has sm_90 and sm_100 multiply in float16, exactly: there a weight's bytes take the time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpq_fx.formats import ROW, TENSOR, Format
from mpq_fx.kernels.linear.triton_epilogue import finish, tile_of
from mpq_fx.kernels.linear.triton_linear import Call, LinearKernel, Shape, define
from mpq_fx.kernels.tile import (
    INTERPRETER,
    Machine,
    Tile,
    around,
    filling,
    fitting,
    held,
    machine,
    roomy,
)

NAME = "float8_linear"
LONGEST = 128  # of a sum in a tensor core: BLOCK_K at most
# rows up to -> tiles, the largest first: it is taken where it gives every processor a program.
TILES = {
    16: (Tile(16, 64, 128, 1, 4, 5), Tile(16, 32, 128, 1, 4, 5), Tile(16, 16, 128, 1, 2, 5)),
    32: (Tile(32, 64, 128, 1, 4, 5), Tile(32, 32, 128, 1, 4, 5), Tile(32, 16, 128, 1, 2, 5)),
    64: (Tile(64, 128, 128, 4, 4, 4), Tile(64, 64, 128, 4, 4, 4), Tile(64, 32, 128, 4, 4, 4)),
    256: (Tile(128, 128, 128, 8, 8, 3), Tile(64, 128, 128, 8, 4, 3), Tile(64, 64, 128, 8, 4, 4)),
    0: (  # more
        Tile(128, 256, 128, 8, 8, 3),
        Tile(128, 128, 128, 8, 8, 3),
        Tile(128, 128, 64, 8, 8, 4),
        Tile(64, 64, 128, 8, 4, 4),
    ),
}
OLDEST = (8, 9)  # the architecture from which on tensor cores multiply 8-bit floats
EXACT = ("sm_100", "sm_103")  # whose tensor cores sum in float32 all the way


def refuse_formats(x: Format, w: Format) -> Iterator[str]:
    """Why this linear is not for tensor cores of 8-bit floats."""
    for fmt, what in ((x, "activations"), (w, "weights")):
        if not fmt.has_float_codes or fmt.element.bits != 8 or fmt.block not in (ROW, TENSOR):
            yield f"{what} are 8-bit floats with a scale per row or tensor here, not {fmt}"


def refuse_shape(shape: Shape) -> Iterator[str]:
    """Where there are no such tensor cores."""
    if not multiplies_float8(shape.machine):
        yield f"{shape.machine.architecture} multiplies no 8-bit floats; sm_89 and later do"


def multiplies_float8(at: Machine) -> bool:
    """Do its tensor cores take 8-bit floats?  Before sm_89 Triton does not even compile e4m3."""
    digits = at.architecture.removeprefix("sm_")
    return at.architecture == INTERPRETER or (int(digits[:-1]), int(digits[-1])) >= OLDEST


def pack(w: Tensor, scale: Tensor, zero: Tensor, fmt: Format) -> tuple[Tensor, ...]:
    """(codes [N, K] in rows, their scales [N])"""
    codes = w.clone(memory_format=torch.contiguous_format)
    return codes, scale.float().reshape(-1).expand(w.shape[0]).clone()


def tile(m: int, n: int, k: int, at: Machine, *, is_plain: bool) -> Tile:
    """By the table: the largest that gives every processor a program."""
    return filling(listed(m, at, is_plain=is_plain), at, m, n)


def listed(m: int, at: Machine, *, is_plain: bool = True) -> tuple[Tile, ...]:
    """The tiles of the table for so many rows."""
    tiles = TILES[next((rows for rows in TILES if m <= rows), 0)]
    return kept(tiles, at, is_plain=is_plain)


def configurations(m: int, n: int, k: int, at: Machine) -> tuple[Tile, ...]:
    """What a search tries: the tiles of the table for so many rows, and each one's neighbors."""
    found = (near for tile in listed(m, at) for near in around(tile))
    return kept(tuple(dict.fromkeys(found)), at, is_plain=True)


def kept(tiles: Sequence[Tile], at: Machine, *, is_plain: bool) -> tuple[Tile, ...]:
    """Those whose operands fit into shared memory, and whose sums leave registers for what else
    there is: an epilogue, or the same sums in float32.
    """
    found = fitting(tiles, at, 1, 1)
    if is_promoted(at) or not is_plain:
        return roomy(found)
    return held(found)


def is_promoted(at: Machine) -> bool:
    """Are the sums of a tensor core added in float32, since they are not in float32 themselves?"""
    return at.architecture not in EXACT


@triton.jit
def float8_kernel(
    x_ptr,
    x_scale_ptr,
    w_ptr,
    w_scale_ptr,
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
    PROMOTE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    IS_EVEN: tl.constexpr,
):
    program = tl.program_id(0)
    first_row, first_column = tile_of(program, M, N, BLOCK_M, BLOCK_N, GROUP_M)  # type: ignore
    row = first_row + tl.arange(0, BLOCK_M)
    column = first_column + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows and columns past the end read those of the beginning, and are not stored.
    stride_xk = tl.cast(stride_xk, tl.int64)
    x_at = x_ptr + (row % M)[:, None] * stride_xm + k[None, :] * stride_xk
    w_at = w_ptr + (column % N)[None, :] * K + k[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        if IS_EVEN:
            x, w = tl.load(x_at), tl.load(w_at)
        else:
            x = tl.load(x_at, mask=k[None, :] < K - start, other=0.0)
            w = tl.load(w_at, mask=k[:, None] < K - start, other=0.0)
        if PROMOTE:
            # Only with a limit on what is summed imprecisely does sm_90 multiply 8-bit floats, and
            # sm_89 keep the product apart from the sum.
            sums += tl.dot(x, w, max_num_imprecise_acc=BLOCK_K)
        else:
            sums = tl.dot(x, w, sums)
        x_at += BLOCK_K * stride_xk
        w_at += BLOCK_K
    row, column = (row % M)[:, None], (column % N)[None, :]
    y = sums * tl.load(x_scale_ptr + row * STRIDE_S)
    y = y * tl.load(w_scale_ptr + column)
    after = (addend_ptr, addend_scale_ptr, addend_zero_ptr, out_scale_ptr, out_zero_ptr)
    at = (first_row, first_column, M, N)
    finish(y, y_ptr, *at, bias_ptr, *after, stride_am, stride_an, ACTIVATION, LOW, HIGH)


def launch(call: Call) -> Tensor:
    """One program per tile of results."""
    y, (w, scales) = call.empty(), call.packed
    (m, k), n, at = call.x.shape, call.n, machine(call.x.device)
    cut = call.tile or tile(m, n, k, at, is_plain=call.epilogue.is_plain)
    assert cut.block_k <= LONGEST, f"sums of {cut.block_k} products in a tensor core"
    float8_kernel[(cut.count(m, n),)](
        *(call.x, call.x_scale, w, scales, y),
        M=m,
        N=n,
        K=k,
        stride_xm=call.x.stride(0),
        stride_xk=call.x.stride(1),
        STRIDE_S=0 if call.x_fmt.block == TENSOR else 1,
        PROMOTE=is_promoted(at),
        BLOCK_M=cut.block_m,
        BLOCK_N=cut.block_n,
        BLOCK_K=cut.block_k,
        GROUP_M=cut.group_m,
        IS_EVEN=k % cut.block_k == 0,
        num_warps=cut.warps,  # type: ignore[call-arg] -- the launcher's
        num_stages=cut.stages,  # type: ignore[call-arg]
        **call.epilogue.arguments(n),
    )
    return y


FLOAT8 = define(LinearKernel(NAME, refuse_formats, refuse_shape, pack, launch, configurations))
