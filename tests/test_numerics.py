"""The specification against the laws of scales, codes and blocks; of rounding: test_rounding."""

from __future__ import annotations

import math

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq_fx.errors import CalibrationError, WeightError
from mpq_fx.formats import FORMATS, Int
from mpq_fx.numerics import (
    Quantized,
    block_sums,
    check_finite,
    dequantize,
    dequantize_weight,
    fake_quantize,
    fake_quantize_weight,
    noise_power,
    pack_int4,
    quantize,
    quantize_weight,
    relative_rms,
    scale_and_zero,
    spread,
    unpack_int4,
)

SCALED = [fmt for fmt in FORMATS.values() if fmt.scale is not None]
EVERY = pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
CODED = pytest.mark.parametrize("fmt", SCALED, ids=str)
# A grid of a second level begins where its group does, and has steps of its own.
ONE_LEVEL = [fmt for fmt in SCALED if not fmt.progressive]
SINGLE = pytest.mark.parametrize("fmt", ONE_LEVEL, ids=str)
SYMMETRIC = pytest.mark.parametrize("fmt", [f for f in ONE_LEVEL if f.symmetric], ids=str)
ASYMMETRIC = pytest.mark.parametrize("fmt", [f for f in SCALED if not f.symmetric], ids=str)

FEW = settings(max_examples=25)  # for each format

# Small magnitudes underflow a float16 scale's range on purpose; large ones stay inside it.
tensors = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.integers(1, 140)),
    elements=st.floats(-60000, 60000, width=32),
).map(torch.from_numpy)


def every_bfloat16() -> torch.Tensor:
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    return x[x.isfinite()].float()


def stretched(q: Quantized, fmt, part: torch.Tensor) -> torch.Tensor:
    return spread(part, fmt, q.codes.shape[-1]).float().expand(q.codes.shape)


# --- fake_quantize is dequantize(quantize)


@EVERY
def test_the_fast_float_path_equals_codes_and_back_on_every_bfloat16(fmt):
    x = every_bfloat16()
    x = x[x.abs() < 1e30]
    for rows in (x.view(1, -1), x[: len(x) // 64 * 64].view(-1, 64)):
        assert torch.equal(fake_quantize(rows, fmt), dequantize(quantize(rows, fmt), fmt))


@CODED
@FEW
@given(x=tensors, factor=st.floats(2**-7, 3.0, width=32))
def test_the_fast_float_path_equals_codes_and_back_with_a_scale_given(fmt, x, factor):
    scale, zero = scale_and_zero(x, fmt)
    scale = (scale.float() * factor).to(scale.dtype).clamp(min=1e-6)
    want = dequantize(quantize(x, fmt, scale, zero), fmt)
    assert torch.equal(fake_quantize(x, fmt, scale, zero), want)


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_fast_float_path_keeps_the_dtype_of_its_input(fmt, dtype):
    x = torch.randn(3, 130).to(dtype)
    got = fake_quantize(x, fmt)
    assert got.dtype == dtype
    assert torch.equal(got, dequantize(quantize(x, fmt), fmt).to(dtype))


@CODED
def test_a_weight_of_any_rank_has_a_row_per_output(fmt):
    w = torch.randn(5, 3, 4, 4)
    q, flat = quantize_weight(w, fmt), quantize(w.flatten(1), fmt)
    assert q.codes.shape == w.shape
    assert torch.equal(q.codes.flatten(1), flat.codes)
    assert torch.equal(q.scale, flat.scale)
    assert torch.equal(dequantize_weight(q, fmt), fake_quantize_weight(w, fmt))
    assert fake_quantize_weight(torch.randn(9), fmt).shape == (9,)


# --- laws of scales and codes


@SINGLE
@FEW
@given(x=tensors)
def test_no_value_is_off_by_more_than_half_a_step(fmt, x):
    q = quantize(x, fmt)
    step = stretched(q, fmt, q.scale) * steps_of(x / stretched(q, fmt, q.scale), fmt)
    slack = 1e-6 * x.abs() + 1e-6 * step  # of the float32 division and product
    assert bool(((dequantize(q, fmt) - x).abs() <= step / 2 + slack).all())


def steps_of(values: torch.Tensor, fmt) -> torch.Tensor:
    """How far apart the codes are around a code: 1 for integers, of floats 2^(exponent - man)."""
    if isinstance(fmt.element, Int):
        return torch.ones_like(values)
    exponent = torch.frexp(values.abs().clamp(max=fmt.max)).exponent - 1
    return torch.exp2(exponent.clamp(min=1 - fmt.element.bias) - fmt.element.man)


@CODED
@FEW
@given(x=tensors)
def test_codes_and_zero_points_stay_in_range(fmt, x):
    q, low, high = quantize(x, fmt), fmt.qmin, fmt.qmax
    codes = q.codes.float()
    assert q.codes.dtype == fmt.dtype
    assert low <= float(codes.min()) <= float(codes.max()) <= high
    assert low <= int(q.zero.min()) <= int(q.zero.max()) <= high
    assert q.scale.dtype == fmt.scale
    assert q.zero.dtype == torch.int32
    assert tuple(q.scale.shape) == tuple(q.zero.shape) == fmt.scale_shape(x.shape)
    assert bool((q.scale > 0).all())


@CODED
@FEW
@given(x=tensors)
def test_codes_survive_being_dequantized(fmt, x):
    q = quantize(x, fmt)
    again = quantize(dequantize(q, fmt), fmt, q.scale, q.zero)
    assert torch.equal(again.codes, q.codes)


@CODED
@FEW
@given(x=tensors)
def test_codes_grow_with_values(fmt, x):
    row = x.flatten()[:32].sort().values  # within one block
    assert bool((quantize(row, fmt).codes.float().diff() >= 0).all())


@SYMMETRIC
@FEW
@given(x=tensors)
def test_a_symmetric_format_commutes_with_negation(fmt, x):
    plus, minus = quantize(x, fmt), quantize(-x, fmt)
    assert torch.equal(plus.scale, minus.scale)
    assert torch.equal(plus.codes.float(), -minus.codes.float())
    assert not bool(plus.zero.any())


@SINGLE
@FEW
@given(x=tensors)
def test_zero_is_represented_exactly(fmt, x):
    x = x.clone()
    x[:, 0] = 0.0
    assert not bool(fake_quantize(x, fmt)[:, 0].any())


@CODED
def test_blocks_of_zeros_have_scale_one(fmt):
    for x in (torch.zeros(2, 5), torch.zeros(2, 0), torch.zeros(0, 5)):
        scale, _ = scale_and_zero(x, fmt)
        assert bool((scale == 1).all())
        assert torch.equal(fake_quantize(x, fmt), x)


@SYMMETRIC
def test_the_largest_magnitude_has_the_largest_code(fmt):
    x = torch.linspace(-3.0, 2.0, 32).view(1, 32)
    q = quantize(x, fmt)
    assert float(q.codes[0, 0]) == -fmt.max
    assert float(q.scale.flatten()[0]) == pytest.approx(3.0 / fmt.max, rel=1e-3)


@ASYMMETRIC
def test_an_asymmetric_range_spends_every_code(fmt):
    q = quantize(torch.linspace(0.0, 5.0, 128).view(1, 128), fmt)
    assert (int(q.codes.min()), int(q.codes.max())) == (fmt.qmin, fmt.qmax)
    q = quantize(torch.linspace(3.0, 5.0, 128).view(1, 128), fmt)
    assert int(q.zero.flatten()[0]) == fmt.qmin, "the range includes 0"


@given(absmax=st.floats(2**-20, 400000, width=32))
def test_a_float16_scale_is_the_smallest_that_covers_its_block(absmax):
    fmt = FORMATS["int4_row"]
    scale, _ = scale_and_zero(torch.tensor([[absmax, 0.0]]), fmt)
    raw = torch.tensor(absmax) / 7
    below = (scale.view(torch.int16) - 1).view(torch.float16)
    assert scale.dtype == torch.float16
    assert float(below) < float(raw) <= float(scale)


def test_extreme_magnitudes_neither_overflow_nor_divide_by_zero():
    for fmt in SCALED:
        for magnitude in (1e-45, 1e-38, 1e-12, 3e38):
            x = torch.tensor([[magnitude, -magnitude]])
            assert bool(fake_quantize(x, fmt).isfinite().all()), (fmt, magnitude)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_value_without_a_scale_shows_up_in_the_result(poison):
    for fmt in SCALED:
        x = torch.tensor([[1.0, poison]])
        q = quantize(x, fmt)
        assert not bool(q.scale.isfinite().all()), fmt
        assert not bool(dequantize(q, fmt).isfinite().all()), fmt


def test_groups_have_their_own_scales_and_the_last_may_be_ragged():
    fmt = FORMATS["int4_g32"]
    x = torch.cat([torch.full((2, 32), 7.0), torch.full((2, 5), 0.7)], dim=1)
    q = quantize(x, fmt)
    assert q.scale.shape == (2, 2)
    assert q.scale[0].tolist() == pytest.approx([1.0, 0.1], rel=1e-3)
    assert bool((q.codes == 7).all())


@CODED
def test_any_strides_give_the_same_codes(fmt):
    x = torch.randn(6, 5, 40)
    for view in (x.transpose(0, 2), x[::2, :, 1::3], x[:, :1].expand(6, 3, 40), x.permute(1, 2, 0)):
        a, b = quantize(view, fmt), quantize(view.contiguous(), fmt)
        assert torch.equal(a.codes, b.codes)
        assert torch.equal(a.scale, b.scale)
        assert torch.equal(fake_quantize(view, fmt), fake_quantize(view.contiguous(), fmt))


@CODED
@FEW
@given(x=tensors)
def test_sums_over_blocks_are_the_transpose_of_spreading_scales(fmt, x):
    x = x / 60000
    scale = torch.rand(fmt.scale_shape(x.shape), dtype=torch.float64)
    left = float((spread(scale, fmt, x.shape[-1]) * x.double()).sum())
    right = float((scale * block_sums(x.double(), fmt, scale)).sum())
    assert left == pytest.approx(right, abs=1e-9)


# --- packing


def test_packing_puts_the_even_position_in_the_low_nibble():
    assert pack_int4(torch.tensor([1, -1, 7], dtype=torch.int8)).tolist() == [0xF1, 0x07]


def test_every_pair_of_codes_survives_packing():
    code = torch.arange(-8, 8, dtype=torch.int8)
    pairs = torch.cartesian_prod(code, code)
    packed = pack_int4(pairs)
    assert packed.unique().numel() == 256
    assert torch.equal(unpack_int4(packed, 2), pairs)


@given(rows=st.integers(0, 3), k=st.integers(0, 9))
def test_rows_of_any_length_survive_packing(rows, k):
    codes = torch.randint(-8, 8, (rows, k), dtype=torch.int8)
    packed = pack_int4(codes)
    assert packed.shape == (rows, (k + 1) // 2)
    assert torch.equal(unpack_int4(packed, k), codes)
    strided = torch.randint(-8, 8, (k, rows), dtype=torch.int8).t()
    assert torch.equal(unpack_int4(pack_int4(strided), k), strided)


# --- what is refused, and how error is measured


@pytest.mark.parametrize(
    ("bad", "error"), [(math.nan, WeightError), (math.inf, CalibrationError)], ids=str
)
def test_values_without_a_scale_are_refused_with_their_count(bad, error):
    x = torch.tensor([1.0, bad, 2.0])
    with pytest.raises(error, match="among 3") as caught:
        check_finite(x, "the weight of fc1", "model.py:31", error)
    assert caught.value.at == "model.py:31"


def test_finite_and_integer_tensors_pass():
    check_finite(torch.randn(3), "w", "")
    check_finite(torch.arange(3), "w", "")
    check_finite(torch.empty(0), "w", "")


def test_relative_rms_is_the_root_of_the_noise_power():
    ref = torch.randn(100)
    y = ref * 1.01
    assert relative_rms(y, ref) == pytest.approx(0.01, rel=1e-5)
    assert noise_power(y, ref) == pytest.approx(1e-4, rel=1e-5)
    assert relative_rms(ref, ref) == 0.0


def test_relative_rms_is_summed_in_float64():
    ref = torch.full((10,), 1e30)
    assert relative_rms(ref * 2, ref) == pytest.approx(1.0)
    ref = torch.full((10,), 200.0, dtype=torch.float16)
    assert relative_rms(ref * 2, ref) == pytest.approx(1.0)


def test_relative_rms_of_special_values():
    ref = torch.tensor([1.0, -math.inf, math.nan])
    assert relative_rms(ref, ref) == 0.0, "a mask's infinities are no error"
    assert relative_rms(torch.tensor([1.0, 0.0, math.nan]), ref) == math.inf
    assert relative_rms(torch.tensor([math.nan, -math.inf, math.nan]), ref) == math.inf
    assert relative_rms(torch.zeros(3), torch.zeros(3)) == 0.0
    assert relative_rms(torch.ones(3), torch.zeros(3)) == math.inf
    assert relative_rms(torch.empty(0), torch.empty(0)) == 0.0
    assert relative_rms(torch.tensor([2j]), torch.tensor([1j])) == 1.0
