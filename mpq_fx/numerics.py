"""code = clamp(round(x / scale) + zero, qmin, qmax);   value = (code - zero) * scale

Codes of a float element round to the nearest of its values instead, a tie to the even code, and
saturate at the largest, where a cast of torch may give NaN or infinity; they have no zero point.

The slow obvious specification every kernel is held to.  Scales are computed in float32 and have
one entry per block: shape () per tensor, [..., 1] per row, [..., groups] for groups along the last
dimension, whose last group may be ragged.  `zero` has the shape of `scale` and is int32, so that
nobody subtracts it in 8 bits; its values fit a code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mpq_fx.errors import MpqError, WeightError
from mpq_fx.formats import ROW, TENSOR, Float, Format, Int, Progressive


@dataclass(frozen=True, eq=False)
class Quantized:
    """value = (codes - zero) * scale; codes have the shape of the tensor, one code per element."""

    codes: Tensor
    scale: Tensor
    zero: Tensor


def grid(element: Int | Float) -> tuple[Tensor, Tensor]:
    """(every finite value of `element`, ascending, float64; whether its code is even)"""
    assert element.bits <= 16, f"{element} has too many values to list"
    if isinstance(element, Int):
        values = torch.arange(element.min, element.max + 1)
        return values.double(), values % 2 == 0
    codes = range(element.max_code + 1)
    positive = torch.tensor([element.value(code) for code in codes], dtype=torch.float64)
    even = torch.tensor([code % 2 == 0 for code in codes])
    return torch.cat([-positive.flip(0)[:-1], positive]), torch.cat([even.flip(0)[:-1], even])


def round_to(x: Tensor, element: Int | Float) -> Tensor:
    """The value of `element` nearest to x; a tie goes to the even code; out of range saturates.

    NaN stays NaN, and a float element keeps the sign of what it rounds to zero.
    """
    values, even = (part.to(x.device) for part in grid(element))
    ties = (values[1:] + values[:-1]) / 2
    down = torch.full_like(ties, -torch.inf)
    ties = torch.where(even[1:], torch.nextafter(ties, down), ties)  # upper code even: round up
    near = values[torch.bucketize(x.double(), ties)].to(x.dtype)
    near = near.copysign(x) if isinstance(element, Float) else near
    return torch.where(x.isnan(), x, near)


def check_finite(x: Tensor, what: str, at: str, error: type[MpqError] = WeightError) -> None:
    """Refuse NaN and infinity: there is no scale for them."""
    if not x.is_floating_point() or bool(torch.isfinite(x).all()):
        return
    nans, infinities = int(x.isnan().sum()), int(x.isinf().sum())
    raise error(
        f"{what} has {nans} NaN and {infinities} infinite values among {x.numel()}",
        at=at,
        fix="find where they come from; a number format needs finite values",
    )


def scale_and_zero(x: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """scale = absmax / qmax, or (max - min) / (qmax - qmin) over a range that includes 0.

    A block of zeros, or of no values, has scale 1.  NaN and infinity in x show up in the scale.
    """
    assert fmt.scale is not None, f"{fmt} has no scale"
    low, high = ranges(x, fmt)
    if fmt.symmetric:
        scale = stored_scale(torch.maximum(-low, high) / fmt.max, fmt)
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    levels = fmt.qmax - fmt.qmin
    scale = stored_scale(high / levels - low / levels, fmt)  # high - low may overflow
    zero = (fmt.qmin - torch.round(low / scale.float())).clamp(fmt.qmin, fmt.qmax)
    return scale, zero.nan_to_num().to(torch.int32)


def ranges(x: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """(min(x, 0), max(x, 0)) of each block, in float32"""
    blocks = blocked(x.float(), fmt)
    if blocks.shape[-1] == 0:
        empty = blocks.new_zeros(blocks.shape[:-1])
        return empty, empty
    return blocks.amin(-1).clamp(max=0.0), blocks.amax(-1).clamp(min=0.0)


def stored_scale(raw: Tensor, fmt: Format) -> Tensor:
    """The smallest value of fmt.scale that is >= raw, so that no value of the block saturates."""
    assert fmt.scale is not None, f"{fmt} has no scale"
    facts = torch.finfo(fmt.scale)
    floor = max(torch.finfo(torch.float32).tiny, facts.tiny * facts.eps)
    raw = torch.where(raw == 0, torch.ones_like(raw), raw).clamp(min=floor)
    if fmt.scale == torch.float32:
        return raw
    near = torch.where(raw.isinf(), raw, raw.clamp(max=facts.max)).to(fmt.scale)
    bits = near.view({1: torch.uint8, 2: torch.int16}[fmt.scale.itemsize])
    up = (bits + 1).view(fmt.scale)  # the next larger value, for a positive one
    return torch.where((near.float() < raw) & (near.float() < facts.max), up, near)


def blocked(x: Tensor, fmt: Format) -> Tensor:
    """[..., K] -> the shape of the scale, and then one dimension with the values of a block.

    A ragged last group is filled with zeros: they change no sum, and no range that includes 0.
    """
    if fmt.block == TENSOR:
        return x.reshape(-1)
    x = x.reshape(1) if x.ndim == 0 else x
    if fmt.block == ROW:
        return x.unsqueeze(-2)
    groups = fmt.groups(x.shape[-1])
    missing = groups * fmt.block - x.shape[-1]
    return torch.nn.functional.pad(x, (0, missing)).unflatten(-1, (groups, fmt.block))


def spread(scale: Tensor, fmt: Format, k: int) -> Tensor:
    """scale (or zero) of each block -> something that broadcasts against [..., k]"""
    if fmt.block <= 0:
        return scale
    return scale.repeat_interleave(fmt.block, dim=-1)[..., :k]


def block_sums(values: Tensor, fmt: Format, scale: Tensor) -> Tensor:
    """Σ of the values of each block, in the shape of `scale`: the transpose of `spread`"""
    sums = blocked(values, fmt).sum(-1)
    return sums.reshape(scale.shape) if fmt.block == TENSOR else sums.sum_to_size(scale.shape)


def nearest(x: Tensor, fmt: Format) -> Tensor:
    """round_to by an operation of torch that sends ties to even too; integers are not saturated"""
    if fmt.has_float_codes:
        return x.clamp(fmt.qmin, fmt.qmax).to(fmt.dtype).to(x.dtype)
    return torch.round(x)


def saturate(codes: Tensor, fmt: Format) -> Tensor:
    """Integers, which a zero point may have moved out of range; a float saturates as it rounds.

    Those of a progressive format also go to the grid of their group.
    """
    if fmt.has_float_codes:
        return codes
    held = codes.clamp(fmt.qmin, fmt.qmax)
    return held if fmt.progressive is None else to_grid(held, fmt.progressive)


def to_grid(codes: Tensor, second: Progressive) -> Tensor:
    """low + step · round((code - low) / step): the codes of each group on at most 2^bits integers

    The step is the smallest whose grid covers the group within ±limit, and low is its smallest
    code, or what is left below limit.  A group on such a grid already stays as it is, so that
    quantizing twice changes nothing.
    """
    if codes.numel() == 0:
        return codes
    groups = in_groups(codes, second)
    inside = groups.clamp(-second.limit, second.limit)
    low, high = inside.amin(-1, keepdim=True), inside.amax(-1, keepdim=True)
    step = torch.ceil((high - low).double() / second.steps).clamp(min=1.0).to(codes.dtype)
    low = torch.minimum(low, second.limit - second.steps * step)
    near = low + step * torch.round((inside - low).double() / step).to(codes.dtype)
    _, found_step, found_low = on_grid(groups.int(), second)
    is_kept = groups.int().amax(-1, keepdim=True) - found_low <= second.steps * found_step
    return torch.where(is_kept, groups, near).flatten(-2)[..., : codes.shape[-1]]


def in_groups(codes: Tensor, second: Progressive) -> Tensor:
    """[..., K] -> [..., groups, block]; a ragged last group is filled with its last code"""
    groups = second.groups(codes.shape[-1])
    last = codes[..., -1:].expand(*codes.shape[:-1], groups * second.block - codes.shape[-1])
    return torch.cat([codes, last], -1).unflatten(-1, (groups, second.block))


def on_grid(groups: Tensor, second: Progressive) -> tuple[Tensor, Tensor, Tensor]:
    """int32 [..., block] -> (q, step, low): the widest grid that holds each group exactly

    q may exceed 2^bits - 1, if the codes do not lie on a grid of the format.
    """
    low = groups.amin(-1, keepdim=True)
    step = groups - low
    while step.shape[-1] > 1:
        half = (step.shape[-1] + 1) // 2
        step = torch.gcd(step[..., :half], step[..., -half:])
    step = step.clamp(min=1)
    return (groups - low) // step, step, low


def parameters(
    x: Tensor, fmt: Format, scale: Tensor | None, zero: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The scale and zero given, or those of x itself; without a zero point it is 0."""
    if scale is None:
        return scale_and_zero(x, fmt)
    return scale, torch.zeros_like(scale, dtype=torch.int32) if zero is None else zero


def quantize(
    x: Tensor, fmt: Format, scale: Tensor | None = None, zero: Tensor | None = None
) -> Quantized:
    """codes = clamp(round(x / scale) + zero, qmin, qmax); of a plain float format, a cast"""
    if fmt.is_plain:
        return Quantized(x.to(fmt.dtype), x.new_empty(0), x.new_empty(0, dtype=torch.int32))
    scale, zero = parameters(x, fmt, scale, zero)
    k = x.shape[-1] if x.ndim else 1
    steps = nearest(x.float() / spread(scale, fmt, k).float(), fmt)
    codes = steps if fmt.has_float_codes else saturate(steps + spread(zero, fmt, k), fmt)
    return Quantized(codes.to(fmt.dtype).view(x.shape), scale, zero)


def dequantize(q: Quantized, fmt: Format) -> Tensor:
    """(codes - zero) * scale in float32"""
    if fmt.is_plain:
        return q.codes.float()
    k = q.codes.shape[-1] if q.codes.ndim else 1
    steps = q.codes.float() - spread(q.zero, fmt, k)
    return (steps * spread(q.scale, fmt, k).float()).view(q.codes.shape)


def fake_quantize(
    x: Tensor, fmt: Format, scale: Tensor | None = None, zero: Tensor | None = None
) -> Tensor:
    """dequantize(quantize(x)) in x's dtype, without making codes: the fast path of replays"""
    if fmt.is_plain:
        return x.to(fmt.dtype).to(x.dtype)
    scale, zero = parameters(x, fmt, scale, zero)
    k = x.shape[-1] if x.ndim else 1
    factor = spread(scale, fmt, k).float()
    steps = nearest(x.float() / factor, fmt)
    if fmt.symmetric:
        return (saturate(steps, fmt) * factor).view(x.shape).to(x.dtype)
    shift = spread(zero, fmt, k)
    return ((saturate(steps + shift, fmt) - shift) * factor).view(x.shape).to(x.dtype)


def weight_rows(w: Tensor) -> Tensor:
    """A weight of any rank as [rows, K]: rows are dimension 0, K is the rest flattened."""
    return w.flatten(1) if w.ndim > 1 else w.reshape(1, -1)


def quantize_weight(w: Tensor, fmt: Format) -> Quantized:
    """quantize over [rows, K]; the codes keep the weight's shape"""
    q = quantize(weight_rows(w), fmt)
    return Quantized(q.codes.view(w.shape), q.scale, q.zero)


def dequantize_weight(q: Quantized, fmt: Format) -> Tensor:
    """dequantize over [rows, K], in the weight's shape"""
    flat = Quantized(weight_rows(q.codes), q.scale, q.zero)
    return dequantize(flat, fmt).view(q.codes.shape)


def fake_quantize_weight(w: Tensor, fmt: Format) -> Tensor:
    """dequantize_weight(quantize_weight(w)) in w's dtype"""
    return fake_quantize(weight_rows(w), fmt).view(w.shape)


def pack_int4(codes: Tensor) -> Tensor:
    """[..., K] codes in -8 … 7 -> [..., ceil(K / 2)] bytes, the even position in the low nibble"""
    codes = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2)).view(torch.uint8)
    return codes[..., ::2] & 15 | codes[..., 1::2] << 4


def unpack_int4(packed: Tensor, k: int) -> Tensor:
    """The inverse of pack_int4, for rows of `k` codes"""
    both = torch.stack([packed << 4, packed & 240], dim=-1).flatten(-2)
    return both[..., :k].contiguous().view(torch.int8) >> 4  # the shift copies the sign


def relative_rms(y: Tensor, ref: Tensor) -> float:
    """sqrt(Σ (y - ref)² / Σ ref²) in float64; inf where only one of the two is finite"""
    return noise_power(y, ref) ** 0.5


def noise_power(y: Tensor, ref: Tensor) -> float:
    """Σ (y - ref)² / Σ ref²: the square of relative_rms, which adds up over independent errors"""
    assert y.shape == ref.shape, f"{tuple(y.shape)} against {tuple(ref.shape)}"
    got, want = real(y), real(ref)
    finite = torch.isfinite(want)
    special = (got == want) | (got.isnan() & want.isnan()) | finite
    if not bool(special.all()) or not bool(torch.isfinite(got[finite]).all()):
        return float("inf")
    difference = float((got - want)[finite].square().sum())
    signal = float(want[finite].square().sum())
    if signal == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / signal


def real(x: Tensor) -> Tensor:
    """x in float64, a complex tensor as its two parts"""
    x = x.detach()
    return (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).double()
