"""The grid of an element and the one rounding routine, against torch's own casts, exhaustively."""

from __future__ import annotations

import pytest
import torch

from mpq_fx.formats import FORMATS, TENSOR, Float, Format, Int
from mpq_fx.numerics import grid, quantize, round_to

SCALED = [fmt for fmt in FORMATS.values() if fmt.scale is not None]
INTEGERS = [fmt for fmt in SCALED if isinstance(fmt.element, Int)]
# A cast of torch 2.13 saturates to e4m3, but makes infinity of what is too large for e5m2.
E5M2 = Format("e5m2", Float(5, 2), scale=torch.float32)
CODED = [E5M2, *(f for f in SCALED if f.has_float_codes)]
FLOATS = pytest.mark.parametrize("fmt", CODED, ids=str)
ELEMENTS = [Int(8), Int(7), Int(4), Int(8, signed=False), Float(4, 3, "nan"), Float(5, 2)]
ELEMENTS += [Float(2, 1, "none"), Float(3, 2, "none"), Float(2, 3, "none")]


def every_bfloat16() -> torch.Tensor:
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    return x[x.isfinite()].float()


@pytest.mark.parametrize(
    ("element", "dtype"),
    [(Float(4, 3, "nan"), torch.float8_e4m3fn), (Float(5, 2), torch.float8_e5m2)],
    ids=["e4m3fn", "e5m2"],
)
def test_rounding_equals_the_cast_of_torch_on_every_finite_bfloat16(element, dtype):
    x = every_bfloat16()
    assert x.numel() == 65280
    want = x.clamp(-element.max, element.max).to(dtype).float()
    assert torch.equal(round_to(x, element), want)


def test_rounding_equals_the_casts_of_torch_between_every_two_neighbors():
    for element, dtype in (
        (Float(4, 3, "nan"), torch.float8_e4m3fn),
        (Float(5, 2), torch.float8_e5m2),
        (Float(5, 10), torch.float16),
    ):
        values, _ = grid(element)
        middle = ((values[1:] + values[:-1]) / 2).float()
        for x in (middle, middle.nextafter(values[1:].float()), values.float()):
            assert torch.equal(round_to(x, element), x.to(dtype).float()), (element, dtype)


def test_the_values_of_four_bit_floats():
    values, even = grid(Float(2, 1, "none"))
    assert values[values >= 0].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert even[values >= 0].tolist() == [True, False] * 4
    assert round_to(
        torch.tensor([0.25, 0.75, 2.5, 5.0, 7.0, -5.0]), Float(2, 1, "none")
    ).tolist() == [
        0.0,
        1.0,
        2.0,
        4.0,
        6.0,
        -4.0,
    ]


@pytest.mark.parametrize("element", ELEMENTS, ids=str)
def test_the_grid_lists_every_value_once_in_order(element):
    values, even = grid(element)
    assert bool((values[1:] > values[:-1]).all())
    assert values[-1] == element.max
    assert bool((even[1:] != even[:-1]).all()), "neighbors differ in the lowest bit of their codes"
    assert torch.equal(round_to(values, element), values)


@pytest.mark.parametrize("element", ELEMENTS, ids=str)
def test_rounding_finds_the_nearest_value_and_sends_ties_to_the_even_code(element):
    values, even = grid(element)
    x = torch.cat([every_bfloat16().double(), ((values[1:] + values[:-1]) / 2)])
    x = x.clamp(values[0] * 2 - 1, values[-1] * 2 + 1)
    found = torch.searchsorted(values, round_to(x, element))
    gap = (x - values[found]).abs()
    for step in (-1, 1):
        beside = (found + step).clamp(0, len(values) - 1)
        other = (x - values[beside]).abs()
        tie = (other == gap) & (beside != found)
        assert bool((gap <= other).all())
        assert bool(even[found][tie].all())


@pytest.mark.parametrize("fmt", [f for f in SCALED if f.symmetric and f.block == TENSOR], ids=str)
def test_codes_equal_the_rounding_routine_on_every_bfloat16(fmt):
    x, one = every_bfloat16(), torch.tensor(1.0)
    want = round_to(x, fmt.element).clamp(fmt.qmin, fmt.qmax)
    assert torch.equal(quantize(x, fmt, one).codes.float(), want)


@FLOATS
def test_codes_of_floats_equal_the_rounding_routine_around_every_tie(fmt):
    values, _ = grid(fmt.element)
    middle = ((values[1:] + values[:-1]) / 2).float()
    scale = torch.ones(fmt.scale_shape((1, 1)))
    for x in (middle, middle.nextafter(middle + 1), middle.nextafter(middle - 1), values.float()):
        codes = quantize(x.view(-1, 1), fmt, scale).codes
        want = round_to(x, fmt.element).to(fmt.dtype)
        assert torch.equal(codes.view(-1).view(torch.uint8), want.view(torch.uint8))


@FLOATS
def test_codes_of_floats_are_the_saturated_casts_of_torch_byte_for_byte(fmt):
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).float()  # NaN and inf
    want = x.clamp(-fmt.max, fmt.max).to(fmt.dtype)
    scale = torch.ones(fmt.scale_shape((1, 1)))
    assert torch.equal(quantize(x.view(-1, 1), fmt, scale).codes.view(-1).isnan(), x.isnan())
    for got in (quantize(x.view(-1, 1), fmt, scale).codes, round_to(x, fmt.element).to(fmt.dtype)):
        assert torch.equal(got.view(-1).view(torch.uint8), want.view(torch.uint8))


@pytest.mark.parametrize("fmt", [f for f in INTEGERS if f.block == TENSOR], ids=str)
def test_integer_codes_equal_the_rounding_routine_at_every_zero_point(fmt):
    x, one = torch.arange(-520, 520, 0.25), torch.tensor(1.0)
    for zero in range(fmt.qmin, fmt.qmax + 1):
        want = (round_to(x, Int(12)) + zero).clamp(fmt.qmin, fmt.qmax)
        got = quantize(x, fmt, one, torch.tensor(zero, dtype=torch.int32))
        assert torch.equal(got.codes.float(), want)
