"""Codes of 8 bits on a grid of 16 values for each group: a format of two levels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq_fx.formats import FORMATS, Format, Int, Progressive
from mpq_fx.numerics import dequantize, in_groups, on_grid, quantize, relative_rms, to_grid

FMT = FORMATS["int4_progressive"]
SECOND = Progressive()


def pairs(limit: int) -> torch.Tensor:
    """Every lowest and highest code of a group: [pairs, 2]"""
    codes = torch.arange(-limit, limit + 1)
    both = torch.cartesian_prod(codes, codes)
    return both[both[:, 0] <= both[:, 1]]


def between(ends: torch.Tensor, block: int = 128) -> torch.Tensor:
    """Groups from the one to the other, in even steps"""
    fraction = torch.linspace(0, 1, block, dtype=torch.float64)
    return (ends[:, :1] + (ends[:, 1:] - ends[:, :1]) * fraction).round().float()


def test_no_pair_of_ends_leaves_the_range_of_a_byte():
    """All 29161 of them: no code, no step, no beginning, and no byte on the way to a code."""
    ends = pairs(SECOND.limit)
    codes = to_grid(between(ends), SECOND)
    q, step, low = on_grid(in_groups(codes.int(), SECOND), SECOND)
    assert int(codes.abs().max()) == SECOND.limit
    assert int(q.max()) <= SECOND.steps
    assert 1 <= int(step.min()) <= int(step.max()) <= 16
    assert -SECOND.limit <= int(low.min()) <= int(low.max()) <= SECOND.limit
    byte = q * step + low + 128  # what a kernel computes four of in a word
    assert 0 <= int((q * step).min()) <= int((q * step).max()) <= 255
    assert 0 <= int(byte.min()) <= int(byte.max()) <= 255


def test_no_code_is_off_by_more_than_half_a_step():
    ends = pairs(SECOND.limit)
    codes = between(ends)
    step = torch.ceil((ends[:, 1] - ends[:, 0]) / SECOND.steps).clamp(min=1)
    error = (to_grid(codes, SECOND) - codes).abs().amax(1)
    assert bool((2 * error <= step).all())


def test_the_largest_code_of_a_row_stays_as_it_is():
    """So that the scale of a dequantized row is the scale of the row."""
    ends = pairs(SECOND.limit)
    largest = ends[(ends.abs().amax(1) == SECOND.limit)]
    codes = to_grid(between(largest), SECOND)
    assert bool((codes.abs().amax(1) == SECOND.limit).all())
    x = torch.randn(20, 500)
    q = quantize(x, FMT)
    again = quantize(dequantize(q, FMT), FMT)
    assert torch.equal(again.codes, q.codes)
    torch.testing.assert_close(again.scale, q.scale)


@pytest.mark.parametrize(
    ("rule", "limit"),
    [("subtract after", 120), ("subtract before", 119)],
    ids=["q·s - z", "(q - z)·s"],
)
def test_the_protective_range_is_that_of_the_rules_in_the_paper(rule, limit):
    """QoQ rounds its step, and with it ends of a group leave the range: beyond this limit."""

    def widened(ends: torch.Tensor) -> torch.Tensor:
        low, high = ends[:, :1], ends[:, 1:]
        step = torch.round((high - low).double() / 15).clamp(1, 127)
        if rule == "subtract after":
            zero = -low
            return torch.round((ends + zero) / step).clamp(0, 15) * step - zero
        zero = torch.round(-low / step).clamp(0, 15)
        return ((torch.round(ends / step) + zero).clamp(0, 15) - zero) * step

    bound = 127 if rule == "subtract before" else 128
    inside, outside = widened(pairs(limit)), widened(pairs(limit + 1))
    assert int(inside.max()) <= 127
    assert int(inside.min()) >= -bound
    assert int(outside.max()) > 127 or int(outside.min()) < -bound


@settings(max_examples=50)
@given(k=st.integers(0, 300), spread=st.floats(0.1, 100))
def test_a_group_on_a_grid_stays_as_it_is(k, spread):
    x = torch.randn(3, k) * spread * torch.logspace(-1, 1, max(k, 1))[:k]
    codes = quantize(x, FMT).codes
    assert torch.equal(to_grid(codes.float(), SECOND), codes.float())
    groups = in_groups(codes.int(), SECOND)
    q, step, low = on_grid(groups, SECOND)
    assert bool((q <= SECOND.steps).all())
    assert torch.equal(q * step + low, groups)


def test_the_widest_grid_of_a_group_is_found():
    codes = torch.tensor([[-7, -1, 5, 5], [3, 3, 3, 3], [0, 1, 2, 100]], dtype=torch.int32)
    q, step, low = on_grid(codes, SECOND)
    assert step.flatten().tolist() == [6, 1, 1]
    assert low.flatten().tolist() == [-7, 3, 0]
    assert q[0].tolist() == [0, 1, 2, 2]


def test_two_levels_are_better_than_one_at_the_same_bits():
    w = torch.randn(64, 1024)
    errors = {}
    for name in ("int4", "int4_progressive", "int4_row"):
        errors[name] = relative_rms(dequantize(quantize(w, FORMATS[name]), FORMATS[name]), w)
    assert errors["int4_progressive"] < errors["int4"] < errors["int4_row"]


def test_both_levels_are_paid_for():
    assert FMT.storage_bits((10, 256)) == 10 * (256 * 4 + 2 * 16 + 32)
    assert FMT.storage_bits((10, 129)) == 10 * (256 * 4 + 2 * 16 + 32), "a ragged group is whole"
    assert FMT.storage_bits((10, 0)) == 10 * 32
    assert FMT.stored_bits == 4


def test_only_rows_of_int8_have_a_second_level():
    for wrong in ({"block": 128}, {"symmetric": False}):
        with pytest.raises(AssertionError, match="a second level is of int8 rows"):
            Format("wrong", Int(8), torch.float32, progressive=SECOND, **wrong)
