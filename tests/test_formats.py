"""A format is facts; what is derived from them is true of real tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq_fx.errors import ConfigError
from mpq_fx.formats import FORMATS, TENSOR, Float, Format, Int, format_named, index
from mpq_fx.numerics import in_groups, on_grid, pack_int4, quantize_weight, weight_rows

ALL = pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)


@ALL
def test_a_format_is_listed_under_its_own_name(fmt):
    assert FORMATS[fmt.name] is fmt is format_named(fmt.name)
    assert str(fmt) == fmt.name


def test_two_formats_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="two formats are named 'mine'"):
        index(Format("mine", Int(8), torch.float32), Format("mine", Int(4), torch.float32))


@pytest.mark.parametrize(
    ("typo", "meant"), [("int9", "int8"), ("bfloat", "bfloat16"), ("int4_g23", "int4_g32")]
)
def test_an_unknown_name_is_answered_with_the_nearest(typo, meant):
    with pytest.raises(ConfigError) as caught:
        format_named(typo)
    assert repr(typo) in caught.value.what
    assert caught.value.fix == f"did you mean {meant!r}?"


@pytest.mark.parametrize(
    ("element", "dtype"),
    [
        (Float(8, 23), torch.float32),
        (Float(8, 7), torch.bfloat16),
        (Float(5, 10), torch.float16),
        (Float(5, 2), torch.float8_e5m2),
        (Float(4, 3, "nan"), torch.float8_e4m3fn),
    ],
    ids=str,
)
def test_a_float_element_has_the_facts_of_its_torch_dtype(element, dtype):
    facts = torch.finfo(dtype)
    assert element.bits == facts.bits
    assert element.max == facts.max
    assert element.value(1 << element.man) == facts.tiny
    assert element.value(1) == facts.tiny * facts.eps


def test_a_float_without_specials_uses_every_code():
    assert Float(2, 1, "none").max == 6.0
    assert Float(2, 1, "none").max_code == 7


@pytest.mark.parametrize(
    ("name", "low", "high", "dtype"),
    [
        ("int8", -127, 127, torch.int8),
        ("int8_asym", -128, 127, torch.int8),
        ("uint8_tensor", 0, 255, torch.uint8),
        ("int7_tensor", -63, 63, torch.int8),
        ("int4", -7, 7, torch.int8),
        ("int4_asym", -8, 7, torch.int8),
        ("fp8_e4m3", -448.0, 448.0, torch.float8_e4m3fn),
    ],
)
def test_the_range_of_codes(name, low, high, dtype):
    fmt = FORMATS[name]
    assert (fmt.qmin, fmt.qmax, fmt.dtype) == (low, high, dtype)


def test_seven_bit_codes_cannot_saturate_sixteen_bit_sums():
    fmt, weight = FORMATS["int7_tensor"], FORMATS["int8"]
    assert 2 * (fmt.qmax + 64) * weight.qmax <= torch.iinfo(torch.int16).max
    assert fmt.qmin + 64 >= 0


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_plain_float_has_neither_codes_nor_scales(name):
    fmt = FORMATS[name]
    assert fmt.is_plain
    assert fmt.dtype == getattr(torch, name)
    with pytest.raises(AssertionError, match="plain float and has no codes"):
        _ = fmt.qmax


@pytest.mark.parametrize(
    "facts",
    [
        {"element": Int(8)},
        {"element": Int(8), "scale": torch.float32, "block": -2},
        {"element": Float(4, 3, "nan"), "scale": torch.float32, "symmetric": False},
    ],
    ids=["no scale", "negative block", "a float with a zero point"],
)
def test_a_format_that_contradicts_itself_is_refused(facts):
    with pytest.raises(AssertionError, match="broken"):
        Format("broken", **facts)


def packed_bytes(w: torch.Tensor, fmt: Format) -> int:
    """What a plan file or a kernel stores: ragged groups whole, two 4-bit codes in a byte."""
    q = quantize_weight(w, fmt)
    codes = weight_rows(q.codes)
    if fmt.block > 0:
        missing = -codes.shape[1] % fmt.block
        codes = torch.nn.functional.pad(codes, (0, missing))
    if fmt.progressive:
        q4, step, low = on_grid(in_groups(codes.int(), fmt.progressive), fmt.progressive)
        second = (step.to(torch.uint8), low.to(torch.int8))
        parts = (pack_int4(q4.flatten(1).to(torch.int8)), *second, q.scale)
        return sum(part.numel() * part.itemsize for part in parts)
    if fmt.stored_bits == 4:
        codes = pack_int4(codes)
    zero = torch.empty(0) if fmt.symmetric else q.zero.to(fmt.dtype)
    return sum(part.numel() * part.itemsize for part in (codes, q.scale, zero))


@ALL
@settings(max_examples=40)
@given(shape=st.lists(st.integers(0, 5), max_size=2), k=st.integers(0, 300))
def test_storage_bits_are_those_of_the_tensors_stored(fmt, shape, k):
    w = torch.randn(*shape, k)
    assert fmt.storage_bits(w.shape) == 8 * packed_bytes(w, fmt)


def test_zero_points_and_scales_of_groups_are_paid_for():
    assert FORMATS["int4"].storage_bits((10, 256)) == 10 * 256 * 4.125
    assert FORMATS["int4_g32"].storage_bits((10, 256)) == 10 * 256 * 4.5
    assert FORMATS["int4_asym"].storage_bits((10, 256)) == 10 * (256 * 4 + 2 * (16 + 8))
    assert FORMATS["int4"].storage_bits((10, 129)) == 10 * 256 * 4.125, "a ragged group is whole"
    assert FORMATS["int4_row"].storage_bits((10, 3)) == 10 * (16 + 16), "a row ends on a byte"


@ALL
@settings(max_examples=40)
@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=3), k=st.integers(1, 300))
def test_scale_shape_has_one_entry_per_block(fmt, shape, k):
    blocks = {TENSOR: ()}.get(fmt.block, (*shape, fmt.groups(k)))
    assert fmt.scale_shape((*shape, k)) == blocks
    if fmt.block > 0:
        assert (fmt.groups(k) - 1) * fmt.block < k <= fmt.groups(k) * fmt.block
