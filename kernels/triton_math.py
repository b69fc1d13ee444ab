"""code = clamp(round(x / scale) + zero, LOW, HIGH) and activations, as device functions in Triton

The same float32 arithmetic as `mpq_fx.numerics`, so that codes are equal bit for bit: division
rounds correctly (`/` on a GPU does not), and a tie goes to the even step.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def round_to_even(x):
    """round(x) for |x| <= 2^22: a float32 sum with 1.5 · 2^23 has no bits left for a fraction.

    Not libdevice's rint, which the interpreter has not.
    """
    return (x + 12582912.0) - 12582912.0


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 in another dtype, to nearest: the interpreter's own cast to bfloat16 truncates."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 32767 + ((bits >> 16) & 1)) & -65536  # a tie goes to the even one
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def encode(x, scale, zero, LOW: tl.constexpr, HIGH: tl.constexpr, DTYPE: tl.constexpr):
    """The codes of x in DTYPE; clamped before they are rounded, to stay small."""
    steps = tl.div_rn(x, scale)
    if DTYPE.is_floating():  # type: ignore[attr-defined] -- of Triton's dtype
        return float_code(steps, HIGH, DTYPE)
    shift = zero.to(tl.float32)
    steps = tl.minimum(tl.maximum(steps, LOW - shift), HIGH - shift)
    return (round_to_even(steps) + shift).to(DTYPE)


@triton.jit
def float_code(x, HIGH: tl.constexpr, DTYPE: tl.constexpr):
    """The code of the 8-bit float nearest to x, a tie to the even code, at most HIGH; NaN is NaN.

    In bits, since the interpreter's cast rounds ties up and goes wrong at numbers close to zero.
    A sum with 1.5 · 2^23 times the step of x's binade rounds it to that step.  What is left,
    brought from the bias of DTYPE to that of float32 by a product, has the code in its upper bits:
    what is below 2^(1 - bias) has become subnormal in float32, as it is in DTYPE.
    """
    MANTISSA: tl.constexpr = DTYPE.fp_mantissa_width  # type: ignore[attr-defined]
    BIAS: tl.constexpr = DTYPE.exponent_bias  # type: ignore[attr-defined]
    LEAST: tl.constexpr = (128 - BIAS) << 23  # the exponent of the smallest normal number
    STEP: tl.constexpr = ((23 - MANTISSA) << 23) + (1 << 22)
    size = tl.minimum(tl.abs(x), HIGH * 1.0)
    binade = tl.maximum(size.to(tl.int32, bitcast=True) & 0x7F800000, LEAST)
    large = (binade + STEP).to(tl.float32, bitcast=True)
    near = ((size + large) - large) * 2.0 ** (BIAS - 127)
    code = near.to(tl.int32, bitcast=True) >> (23 - MANTISSA)
    code = tl.where(x == x, code, 0x7F)
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (code | sign).to(tl.uint8).to(DTYPE, bitcast=True)


@triton.jit
def bounds(x):
    """(min(x, 0), max(x, 0)) of each row; NaN counts as infinity, since a reduction drops it."""
    known = tl.where(x == x, x, float("inf"))
    low, high = tl.min(known, 1, keep_dims=True), tl.max(known, 1, keep_dims=True)
    return tl.minimum(low, 0.0), tl.maximum(high, 0.0)


@triton.jit
def stored_scale(raw, DTYPE: tl.constexpr):
    """The least number of DTYPE >= raw, so that no value saturates; 1 for a block of zeros.

    In float32 never a subnormal number; in float16, where only infinity is above 65504, at most
    that.
    """
    known = tl.where(raw == 0.0, 1.0, raw)
    if tl.float32 == DTYPE:
        scale = tl.maximum(known, 1.1754943508222875e-38)
    else:
        tl.static_assert(tl.float16 == DTYPE, "scales are stored in float32 or float16")
        known = tl.maximum(known, 5.960464477539063e-08)
        known = tl.where(known == float("inf"), known, tl.minimum(known, 65504.0))
        near = known.to(tl.float16)
        up = (near.to(tl.int16, bitcast=True) + 1).to(tl.float16, bitcast=True)
        # The next code of a positive number is the next larger number.
        scale = tl.where(near.to(tl.float32) < known, up, near).to(tl.float32)
    return scale


@triton.jit
def scale_and_zero(
    low, high, LOW: tl.constexpr, HIGH: tl.constexpr, SYMMETRIC: tl.constexpr, DTYPE: tl.constexpr
):
    """Of values from low <= 0 to high >= 0: absmax / HIGH, or the range / (HIGH - LOW).

    The scale is a float32 that DTYPE, in which it is stored, has too.
    """
    if SYMMETRIC:
        scale = stored_scale(tl.div_rn(tl.maximum(-low, high), HIGH * 1.0), DTYPE)
        zero = tl.zeros_like(scale)
    else:
        levels: tl.constexpr = (HIGH - LOW) * 1.0
        scale = stored_scale(tl.div_rn(high, levels) - tl.div_rn(low, levels), DTYPE)
        zero = LOW - round_to_even(tl.div_rn(low, scale))
        zero = tl.minimum(tl.maximum(zero, LOW * 1.0), HIGH * 1.0)
    return scale, zero.to(tl.int32)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) without overflow"""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0.0, 1.0, e) / (1.0 + e)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """In float32; "none" is the identity, "gelu_tanh" x · sigmoid(2u), u = √(2/π)(x + .044715x³)"""
    if ACTIVATION == "relu":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)  # a GPU's own maximum drops NaN
    elif ACTIVATION == "silu":
        x = x * sigmoid(x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        x = x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        tl.static_assert(ACTIVATION == "none", "an activation that kernels do not know")
    return x
