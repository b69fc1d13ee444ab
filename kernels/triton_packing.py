"""words[u, n, j] = Σ_i (codes[n, U u + 4 i + j] + 2^(bits-1)) · 2^(bits i),   U = 128 / bits, j < 4

Codes of 4 or 8 bits as int32 words, 8-bit floats as the integers that have their bits.  A unit of
16 bytes holds U neighbors of one row, so that one load of 16 bytes fills it, and units of
neighboring rows stand side by side, so that a warp reads 512 bytes in one piece, whatever its tile.
Codes are stored unsigned.  Those at the same place of four words are neighbors along K: one shift
and one mask give a vector that multiplies four neighboring activations.  The codes that fill the
last unit up are 0.
"""

# pyright: reportOperatorIssue=false
# In device code constants are annotated as tl.constexpr and are numbers.

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

WORDS = 4  # of 32 bits in a unit


def unit_of(bits: int) -> int:
    """Codes in 16 bytes."""
    return WORDS * 32 // bits


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """[N, K] signed codes of `bits` bits -> [ceil(K / U), N, 4] int32"""
    codes = codes.view(torch.int8) if codes.is_floating_point() else codes
    stored = in_units(codes, bits) + (1 << bits - 1)
    return packed(stored.unflatten(-1, (32 // bits, WORDS)).transpose(-1, -2), bits)


def unpack_codes(words: Tensor, bits: int, k: int) -> Tensor:
    """[N, K] int8 codes: the inverse of `pack_codes`"""
    places = unpacked(words, bits).transpose(-1, -2) - (1 << bits - 1)
    return places.flatten(1)[:, :k].to(torch.int8)


def pack_bytes(codes: Tensor) -> Tensor:
    """[N, K] codes in 0 … 15 -> [ceil(K / 32), N, 4] int32 in another order

    Bytes of a word hold codes 8 j … 8 j + 3 in their low halves and the next four in their high
    ones, so that a mask leaves four neighbors in the bytes of a word, as int8 tensor cores want.
    """
    places = in_units(codes, 4).unflatten(-1, (WORDS, 2, 4)).transpose(-1, -2)
    return packed(places.flatten(-2), 4)


def unpack_bytes(words: Tensor, k: int) -> Tensor:
    """[N, K] codes in 0 … 15: the inverse of `pack_bytes`"""
    places = unpacked(words, 4).unflatten(-1, (4, 2)).transpose(-1, -2)
    return places.flatten(1)[:, :k].to(torch.int8)


def pack_rows(codes: Tensor) -> Tensor:
    """[..., K] signed codes of 4 bits -> [..., 16 ceil(K / 32)] bytes, as activations are stored

    The words of `pack_bytes`, each row by itself: byte 4 j + i has code 8 j + i in its low half and
    code 8 j + 4 + i in its high one.  The codes that fill the last 16 bytes up are 0.
    """
    k = codes.shape[-1]
    words = pack_bytes(codes.reshape(math.prod(codes.shape[:-1]), k) & 15).transpose(0, 1)
    return words.contiguous().view(torch.uint8).view(*codes.shape[:-1], packed_width(k))


def unpack_rows(stored: Tensor, k: int) -> Tensor:
    """[..., K] int8 codes: the inverse of `pack_rows`"""
    halves = torch.stack((stored << 4, stored & 0xF0), -1).view(torch.int8) >> 4
    codes = halves.unflatten(-2, (-1, WORDS)).transpose(-1, -2)
    return codes.flatten(-3)[..., :k].contiguous()


def packed_width(k: int) -> int:
    """Bytes of a row of `pack_rows`."""
    return 16 * ((k + 31) // 32)


def in_units(codes: Tensor, bits: int) -> Tensor:
    """[N, K] -> [N, units, U] int64; a last unit that is not full is filled with 0"""
    unit = unit_of(bits)
    missing = -codes.shape[1] % unit
    return torch.nn.functional.pad(codes, (0, missing)).long().unflatten(1, (-1, unit))


def packed(places: Tensor, bits: int) -> Tensor:
    """[N, units, 4, places] -> [units, N, 4] words; a unit is 16 bytes"""
    shifts = torch.arange(0, 32, bits, device=places.device)
    return (places << shifts).sum(-1).to(torch.int32).transpose(0, 1).contiguous()


def unpacked(words: Tensor, bits: int) -> Tensor:
    """[units, N, 4] words -> [N, units, 4, places]"""
    shifts = torch.arange(0, 32, bits, device=words.device)
    return words.transpose(0, 1).unsqueeze(-1) >> shifts & (1 << bits) - 1


@triton.jit
def widened_place(words, zero, PLACE: tl.constexpr, BITS: tl.constexpr):
    """(the code at a place of each word) - zero, exactly, in float32: a mask and a multiply-add

    2^23 + u is the float32 that has u in the lowest bits of its mantissa.  A code that stands p
    bits further up is u · 2^p there, as long as it ends below bit 23; the multiply-add divides
    2^p out again, and subtracts 2^23, the half that codes are stored with, and the zero point.
    Every step is exact; conversions of integers would take twice the instructions.
    """
    UNSHIFTED: tl.constexpr = 23 // BITS
    BIT: tl.constexpr = PLACE % UNSHIFTED * BITS
    FACTOR: tl.constexpr = 1.0 / (1 << BIT)
    MASK: tl.constexpr = ((1 << BITS) - 1) << BIT
    HALF: tl.constexpr = 1 << (BITS - 1)
    moved = words >> (PLACE // UNSHIFTED * UNSHIFTED * BITS)
    raised = ((moved & MASK) | 0x4B000000).to(tl.float32, bitcast=True)
    return raised * FACTOR - (8388608.0 * FACTOR + HALF + zero)


@triton.jit
def widened_float(words, PLACE: tl.constexpr, MANTISSA: tl.constexpr):
    """The 8-bit float at a place of each word, exactly, in float32: its bits, and a multiply

    Exponent and mantissa in the place of float32's have 2^(bias - 127) times the value, a subnormal
    number of few bits included.  Codes are stored with 128 added, which turns the sign over.
    """
    UP: tl.constexpr = 23 - MANTISSA - 8 * PLACE
    MASK: tl.constexpr = 0x7F << (23 - MANTISSA)
    BIAS: tl.constexpr = (1 << (6 - MANTISSA)) - 1
    size = (words << UP if UP >= 0 else words >> -UP) & MASK
    sign = ~(words << (24 - 8 * PLACE)) & -2147483648
    return (size | sign).to(tl.float32, bitcast=True) * 2.0 ** (127 - BIAS)


@triton.jit
def value_at(words, zero, PLACE: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr):
    """What stands at a place of each word, in float32: of floats MANTISSA is not 0"""
    if MANTISSA:
        return widened_float(words, PLACE, MANTISSA)
    return widened_place(words, zero, PLACE, BITS)


@triton.jit
def widened(
    words,
    zero,
    FIRST: tl.constexpr,
    PLACES: tl.constexpr,
    BITS: tl.constexpr,
    MANTISSA: tl.constexpr,
):
    """[N, U, 4] words -> [N, 4 U · PLACES] codes of 4 or 8 places, minus zero, as float32"""
    p0 = value_at(words, zero, FIRST, BITS, MANTISSA)
    p1 = value_at(words, zero, FIRST + 1, BITS, MANTISSA)
    p2 = value_at(words, zero, FIRST + 2, BITS, MANTISSA)
    p3 = value_at(words, zero, FIRST + 3, BITS, MANTISSA)
    if PLACES == 8:
        p4 = value_at(words, zero, FIRST + 4, BITS, MANTISSA)
        p5 = value_at(words, zero, FIRST + 5, BITS, MANTISSA)
        p6 = value_at(words, zero, FIRST + 6, BITS, MANTISSA)
        p7 = value_at(words, zero, FIRST + 7, BITS, MANTISSA)
        even = tl.join(tl.join(p0, p4), tl.join(p2, p6))
        odd = tl.join(tl.join(p1, p5), tl.join(p3, p7))
    else:
        even, odd = tl.join(p0, p2), tl.join(p1, p3)
    return in_order(even, odd, PLACES)


@triton.jit
def in_order(even, odd, PLACES: tl.constexpr):
    """[N, U, 4, …] of even and of odd places, joined in halves -> [N, 4 U · PLACES]

    The codes of a unit are in registers of the thread that loaded it: this moves none of them.
    """
    N: tl.constexpr = even.shape[0]
    U: tl.constexpr = even.shape[1]
    places = tl.reshape(tl.join(even, odd), (N, U, 4, PLACES))
    return tl.reshape(tl.permute(places, (0, 1, 3, 2)), (N, U * 4 * PLACES))


@triton.jit
def in_bytes(words, step, low):
    """[N, U, 4] words of `pack_bytes` -> int8 [N, 32 U] of q · step + low - 128

    The four bytes of a word are multiplied and added at once: they stay in 0 … 255, so that nothing
    is carried into a neighbor.  Flipping its highest bit makes such a byte the signed one.
    """
    spread = low * 0x01010101
    near = ((words & 0x0F0F0F0F) * step + spread) ^ -2139062144  # 0x80808080
    far = (((words >> 4) & 0x0F0F0F0F) * step + spread) ^ -2139062144
    return int8_of(tl.join(near, far))


@triton.jit
def sixteenfold(words):
    """[M, U, 4] words of `pack_rows` -> int8 [M, 32 U] of 16 times the codes

    A code in the upper half of a byte that has nothing else is that: no sign is lost.
    """
    return int8_of(tl.join((words << 4) & -252645136, words & -252645136))  # 0xF0F0F0F0


@triton.jit
def paired(codes):
    """[M, K] codes of 4 bits -> [M, K / 2] bytes of `pack_rows`: K is a multiple of 8"""
    M: tl.constexpr = codes.shape[0]
    K: tl.constexpr = codes.shape[1]
    halves = tl.permute(tl.reshape(codes.to(tl.int32) & 15, (M, K // 8, 2, 4)), (0, 1, 3, 2))
    low, high = tl.split(halves)
    return tl.reshape((low | (high << 4)).to(tl.uint8), (M, K // 2))


@triton.jit
def int8_of(words):
    """[N, U, 4, 2] words -> [N, 32 U] of their bytes, the lowest first: no instruction"""
    even = tl.join(words.to(tl.int8), (words >> 16).to(tl.int8))
    odd = tl.join((words >> 8).to(tl.int8), (words >> 24).to(tl.int8))
    N: tl.constexpr = words.shape[0]
    return tl.reshape(tl.join(even, odd), (N, words.shape[1] * 32))
