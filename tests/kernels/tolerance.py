"""Where kernels are tested and on what, how far float32 sums may be apart, and what is farther."""

from __future__ import annotations

import math

import torch

from mpq_fx.formats import Format
from mpq_fx.numerics import Quantized, pack_int4, spread, unpack_int4

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # without a GPU: Triton's interpreter
UNIT_ROUNDOFF = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def limit(k: int, out: torch.dtype = torch.float32) -> float:
    """Relative RMS that rounding explains: of the output, and of a float32 sum of k products."""
    return UNIT_ROUNDOFF[out] + math.sqrt(k) * UNIT_ROUNDOFF[torch.float32]


# Of [2, 128]: from one value to the next, and from one step of 64 along K, more than 32 bits reach.
FAR = {"rows": (1 << 31, 1), "columns": (1, 1 << 25)}


def far_apart(x: torch.Tensor, strides: tuple[int, int]) -> torch.Tensor:
    """x on the device; the memory between its values is never touched, and so takes no room."""
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=DEVICE).copy_(x)


def swap_nibbles(q: Quantized, fmt: Format) -> Quantized:
    packed = pack_int4(q.codes)
    return Quantized(unpack_int4(packed << 4 | packed >> 4, q.codes.shape[-1]), q.scale, q.zero)


def next_group_scale(q: Quantized, fmt: Format) -> Quantized:
    return Quantized(q.codes, q.scale.roll(1, -1), q.zero)


def next_row_scale(q: Quantized, fmt: Format) -> Quantized:
    return Quantized(q.codes, q.scale.roll(1, 0), q.zero)


def drop_last_block(q: Quantized, fmt: Format) -> Quantized:
    codes = q.codes.clone()
    last = codes[:, codes.shape[1] // 32 * 32 - 32 :]
    last.copy_(spread(q.zero, fmt, codes.shape[1]).expand(codes.shape)[:, -last.shape[1] :])
    return Quantized(codes, q.scale, q.zero)


def bump_one_code(q: Quantized, fmt: Format) -> Quantized:
    """To the next code; of floats the next magnitude, which is the next byte."""
    codes, last = q.codes.clone(), q.codes[0, -1].float()
    place = codes.view(torch.int8) if fmt.has_float_codes else codes
    place[0, -1] += 1 if (last.abs() if fmt.has_float_codes else last) < fmt.qmax else -1
    return Quantized(codes, q.scale, q.zero)
