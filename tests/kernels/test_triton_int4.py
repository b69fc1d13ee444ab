"""mpq_triton::int4_linear against mpq::linear on the same codes, and proof that it bites."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

import mpq_fx.kernels  # noqa: F401 - registers the ops
from mpq_fx.formats import FORMATS, Format, Int, Progressive
from mpq_fx.kernels.linear import triton_int4
from mpq_fx.kernels.linear.triton_epilogue import Epilogue
from mpq_fx.kernels.linear.triton_int4 import INT4, listed, tile
from mpq_fx.kernels.linear.triton_linear import Call, Shape, vector
from mpq_fx.kernels.quantize.triton import stored
from mpq_fx.kernels.tile import ROOMY, Machine, Tile
from mpq_fx.kernels.triton_packing import unpack_bytes
from mpq_fx.numerics import Quantized, quantize, relative_rms
from tests.kernels.tolerance import (
    DEVICE,
    FAR,
    bump_one_code,
    drop_last_block,
    far_apart,
    limit,
    next_group_scale,
    next_row_scale,
    swap_nibbles,
)

NAMES = ("int4_progressive", "int4", "int4_g32", "int4_row", "int4_asym")
X_NAMES = ("int8", "int8_tensor", "int4_row", "int4", "int4_g32", "int4_tensor", "int8_g128")
X_FMTS = [FORMATS[name] for name in X_NAMES]
FMTS = [FORMATS[name] for name in NAMES]
TWO_LEVELS, X = FORMATS["int4_progressive"], FORMATS["int8"]
WHOLE, SPLIT = Tile(16, 16, 64, 2, 4, 1), Tile(16, 16, 64, 1, 4, 1, 3)
fmts = pytest.mark.parametrize("fmt", FMTS, ids=str)
paths = pytest.mark.parametrize("path", [WHOLE, SPLIT], ids=["whole", "split"])
H100 = Machine("sm_90", 132, 227 << 10)


def sample(m: int, n: int, k: int, fmt: Format, x_fmt: Format = X) -> tuple[Quantized, Quantized]:
    w = torch.randn(n, k) * torch.logspace(-1, 1, max(k, 1))[:k]
    return quantize(torch.randn(m, k), x_fmt), quantize(w, fmt)


def run(x, w, fmt: Format, *, path=None, bias=None, x_fmt=X, after=None) -> torch.Tensor:
    parts = (part.to(DEVICE) for part in (w.codes, w.scale, w.zero))
    packed = triton_int4.pack(*parts, fmt)
    after = after or Epilogue(torch.float32, bias)
    codes, scale = stored(x.codes, x_fmt).to(DEVICE), vector(x.scale).to(DEVICE)
    call = Call(codes, scale, None, packed, x_fmt, fmt, w.codes.shape[0], after, path)
    return INT4.launch(call).cpu()


def reference(x, w, fmt: Format, *, bias=None, x_fmt=X) -> torch.Tensor:
    parts = (x.codes, x.scale, x.zero, w.codes, w.scale, w.zero, bias)
    return torch.ops.mpq.linear(*parts, x_fmt.name, fmt.name, torch.float32)


@fmts
@paths
@pytest.mark.parametrize("shape", [(1, 17, 129), (17, 15, 300)], ids=str)
def test_equals_the_reference(shape, path, fmt):
    m, n, k = shape
    bias = torch.randn(n)
    for x_fmt in X_FMTS:
        x, w = sample(m, n, k, fmt, x_fmt)
        got = run(x, w, fmt, path=path, bias=bias.to(DEVICE), x_fmt=x_fmt)
        expected = reference(x, w, fmt, bias=bias, x_fmt=x_fmt)
        assert relative_rms(got, expected) <= limit(k)


@paths
@settings(max_examples=10)
@given(
    m=st.integers(1, 20),
    n=st.integers(1, 20),
    k=st.integers(1, 150),
    fmt=st.sampled_from(FMTS),
    x_fmt=st.sampled_from(X_FMTS),
)
def test_any_shape(path, m, n, k, fmt, x_fmt):
    x, w = sample(m, n, k, fmt, x_fmt)
    got = run(x, w, fmt, path=path, x_fmt=x_fmt)
    assert relative_rms(got, reference(x, w, fmt, x_fmt=x_fmt)) <= limit(k)


@paths
@pytest.mark.parametrize("x_fmt", [X, FORMATS["int4_row"]], ids=str)
@pytest.mark.parametrize("fmt", [TWO_LEVELS, FORMATS["int4_row"]], ids=str)
def test_sums_over_a_row_are_exact(fmt, x_fmt, path):
    """Scales of 1, so that what is stored is the sum."""
    x, w = sample(5, 9, 300, fmt, x_fmt)
    ones = torch.ones(5, 1), torch.ones_like(w.scale)
    x, w = replace(x, scale=ones[0]), replace(w, scale=ones[1])
    want = x.codes.long() @ w.codes.long().T
    assert int(want.abs().max()) < 2**24, "float32 holds every sum"
    assert torch.equal(run(x, w, fmt, path=path, x_fmt=x_fmt), want.float())


@pytest.mark.parametrize(("x_fmt", "code"), [(X, -127), (FORMATS["int4_row"], -7)], ids=str)
def test_the_largest_sums_do_not_overflow(x_fmt, code):
    k = 16384
    x = Quantized(torch.full((1, k), code, dtype=torch.int8), torch.ones(1, 1), torch.zeros(1, 1))
    codes = torch.tensor([[120], [-120]], dtype=torch.int8).expand(2, k).contiguous()
    w = Quantized(codes, torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int32))
    got = run(x, w, TWO_LEVELS, path=Tile(16, 16, 128, 1, 4, 1), x_fmt=x_fmt)
    assert got.tolist() == [[code * 120.0 * k, -code * 120.0 * k]]


def test_every_product_of_two_codes_of_4_bits_is_exact():
    """At every place of a unit, those of the other half of the byte being there too."""
    fmt = FORMATS["int4_row"]
    code = torch.arange(-8, 8, dtype=torch.int8)
    x, w = torch.cartesian_prod(code, code).unsqueeze(-1).unbind(1)
    x, w = x.expand(256, 32).contiguous(), w.expand(256, 32).contiguous()
    ones, zero = torch.ones(256, 1), torch.zeros(256, 1, dtype=torch.int32)
    got = run(Quantized(x, ones, zero), Quantized(w, ones, zero), fmt, x_fmt=fmt)
    assert torch.equal(got, (x.long() @ w.long().T).float())


def test_every_grid_is_widened_exactly():
    """All steps with the lowest and the highest beginning they may have, at all places of words."""
    second = Progressive()
    rows = [
        [low + step * (q % 16) for q in range(32)]
        for step in range(1, 17)
        for low in (-second.limit, second.limit - second.steps * step)
    ]
    codes = torch.tensor(rows, dtype=torch.int8)
    n = len(rows)
    w = Quantized(codes, torch.ones(n, 1), torch.zeros(n, 1, dtype=torch.int32))
    x = Quantized(torch.eye(32, dtype=torch.int8), torch.ones(32, 1), torch.zeros(32, 1))
    got = run(x, w, TWO_LEVELS, path=Tile(32, 32, 32, 1, 4, 1))
    assert torch.equal(got, codes.float().T)


def test_what_is_packed_gives_the_codes_back():
    _, w = sample(1, 7, 300, TWO_LEVELS)
    parts = (part.to(DEVICE) for part in (w.codes, w.scale, w.zero))
    words, scales, low, step = (part.cpu() for part in triton_int4.pack(*parts, TWO_LEVELS))
    q = unpack_bytes(words, 300)
    assert int(q.min()) == 0
    assert int(q.max()) == 15
    group = torch.arange(300) // 128
    codes = q * step.int().T[:, group] + low.int().T[:, group] - 128
    assert torch.equal(codes, w.codes.int())
    assert torch.equal(scales.T, w.scale)
    assert sum(part.numel() * part.element_size() for part in (words, low, step)) <= 7 * (
        320 / 2 + 2 * 3
    )


X_BUGS = [
    (swap_nibbles, "int4_row"),
    (next_group_scale, "int4_g32"),
    (next_row_scale, "int4_row"),
    (drop_last_block, "int4"),
    (bump_one_code, "int4_row"),
]


@paths
@pytest.mark.parametrize(("bug", "name"), X_BUGS, ids=lambda part: getattr(part, "__name__", part))
def test_a_broken_activation_of_4_bits_is_caught(bug, name, path):
    fmt, x_fmt, k = FORMATS["int4"], FORMATS[name], 320
    x, w = sample(8, 6, k, fmt, x_fmt)
    want = reference(x, w, fmt, x_fmt=x_fmt)
    assert relative_rms(run(x, w, fmt, path=path, x_fmt=x_fmt), want) <= limit(k)
    broken = bug(x, x_fmt)
    assert relative_rms(run(broken, w, fmt, path=path, x_fmt=x_fmt), want) > limit(k)


BUGS = [
    (swap_nibbles, "int4"),
    (next_group_scale, "int4_g32"),
    (next_row_scale, "int4_progressive"),
    (drop_last_block, "int4_progressive"),
    (drop_last_block, "int4"),
    (bump_one_code, "int4_asym"),
    (bump_one_code, "int4_row"),
]


@paths
@pytest.mark.parametrize(("bug", "name"), BUGS, ids=lambda part: getattr(part, "__name__", part))
def test_a_broken_weight_is_caught(bug, name, path):
    fmt, k = FORMATS[name], 320
    x, w = sample(8, 6, k, fmt)
    assert relative_rms(run(x, w, fmt, path=path), reference(x, w, fmt)) <= limit(k)
    assert relative_rms(run(x, bug(w, fmt), fmt, path=path), reference(x, w, fmt)) > limit(k)


@pytest.mark.parametrize("part", range(4), ids=["words", "scales", "low", "step"])
def test_a_broken_part_of_two_levels_is_caught(part):
    x, w = sample(4, 6, 300, TWO_LEVELS)
    parts = (each.to(DEVICE) for each in (w.codes, w.scale, w.zero))
    packed = list(triton_int4.pack(*parts, TWO_LEVELS))
    packed[part] = packed[part].roll(1, 0 if part != 1 else 1)  # the next unit, row, groups
    after = Epilogue(torch.float32)
    args = (x.codes.to(DEVICE), x.scale.to(DEVICE), None, tuple(packed), X, TWO_LEVELS, 6, after)
    got = INT4.launch(Call(*args, WHOLE)).cpu()
    assert relative_rms(got, reference(x, w, TWO_LEVELS)) > 1e-2


def test_splits_of_k_agree_and_repeat_bit_for_bit():
    for fmt in (TWO_LEVELS, FORMATS["int4"]):
        x, w = sample(3, 10, 500, fmt)
        found = []
        for split in (1, 2, 3, 16):  # of the last, some programs have nothing to sum
            path = replace(WHOLE, split_k=split)
            first, again = (run(x, w, fmt, path=path) for _ in range(2))
            assert torch.equal(first, again)
            found.append(first)
        assert all(relative_rms(y, found[0]) <= limit(500) for y in found)
        assert fmt is not TWO_LEVELS or all(torch.equal(y, found[0]) for y in found), "integers"


def test_any_strides():
    x, w = sample(9, 11, 140, TWO_LEVELS)
    loose = Quantized(x.codes.t().contiguous().t(), x.scale, x.zero)
    other = Quantized(w.codes.t().contiguous().t(), w.scale, w.zero)
    for path in (WHOLE, SPLIT):
        want = run(x, w, TWO_LEVELS, path=path)
        assert torch.equal(run(loose, other, TWO_LEVELS, path=path), want)


@pytest.mark.parametrize("strides", FAR.values(), ids=FAR)
def test_offsets_have_64_bits(strides):
    x, w = sample(2, 5, 128, TWO_LEVELS)
    far = replace(x, codes=far_apart(x.codes, strides))
    want = run(x, w, TWO_LEVELS, path=WHOLE)
    assert torch.equal(run(far, w, TWO_LEVELS, path=WHOLE), want)


@pytest.mark.parametrize("shape", [(0, 40), (2, 0, 40), (40,), (2, 3, 40)], ids=str)
def test_any_leading_shape_and_nothing_at_all(shape):
    x = quantize(torch.randn(shape), X)
    w, ops = quantize(torch.randn(6, 40), TWO_LEVELS), torch.ops.mpq_triton
    parts = (part.to(DEVICE) for part in (w.codes, w.scale, w.zero))
    packed = ops.int4_linear_pack(*parts, TWO_LEVELS.name)
    end = (*[None] * 6, "int8", TWO_LEVELS.name, 6, "none", torch.float32, "")
    got = ops.int4_linear(x.codes.to(DEVICE), x.scale.to(DEVICE), None, packed, *end)
    assert got.shape == (*shape[:-1], 6)
    assert torch.equal(got.cpu(), reference(x, w, TWO_LEVELS))


def test_what_follows_a_linear_follows_a_split_one_too():
    x, w = sample(5, 12, 300, TWO_LEVELS)
    addend = torch.randn(5, 12)
    for path in (WHOLE, SPLIT):
        end = Epilogue(torch.float32, None, addend.to(DEVICE), activation="relu")
        got = run(x, w, TWO_LEVELS, path=path, after=end)
        assert torch.equal(got, torch.relu(reference(x, w, TWO_LEVELS) + addend))


def test_a_tile_has_one_group_and_fits():
    small = Machine("sm_86", 82, 99 << 10)
    for fmt in FMTS:
        for m in (1, 16, 17, 64, 65, 5000):
            for at in (H100, small):
                assert listed(m, fmt, at)
                cut = tile(m, 4096, 4096, fmt, at)
                group = 128 if fmt.progressive else fmt.block
                assert group <= 0 or group % cut.block_k == 0
                assert cut.split_k == 1 or m <= 64
    assert tile(1, 4096, 14336, TWO_LEVELS, H100).split_k > 1
    for m in (1, 1000):
        found = INT4.configurations(m, 4096, 4096, H100)
        assert len(set(found)) == len(found) >= 4
        assert max(t.values for t in found) <= ROOMY, "more of them spill"


def test_refusals_say_why():
    def said(x: str, fmt: Format, k: int = 64) -> list[str]:
        return [*INT4.refuse(Shape(FORMATS[x], fmt, 1, 64, k, H100))]

    assert said("int8", TWO_LEVELS) == said("int8_tensor", FORMATS["int4_asym"]) == []
    assert "not int8" in said("int8", FORMATS["int8"])[0]
    (groups,) = said("int8", Format("g16", Int(4), torch.float16, 16))
    assert groups == "groups are multiples of 32 here, and those of g16 are 16"
    assert said("int4", FORMATS["int4"]) == said("int4_row", TWO_LEVELS) == []
    for x in ("int8_asym", "bfloat16", "uint8_tensor", "int4_asym"):
        assert f"without a zero point here, not {x}" in said(x, TWO_LEVELS)[0]
    assert "may overflow" in said("int8", TWO_LEVELS, 200_000)[0]
    assert said("int8", FORMATS["int4"], 200_000) == [], "a group has a sum of its own"


@fmts
def test_the_ops_keep_their_contract(fmt):
    x, w = sample(3, 6, 40, fmt)
    parts, ops = [part.to(DEVICE) for part in (w.codes, w.scale, w.zero)], torch.ops.mpq_triton
    torch.library.opcheck(ops.int4_linear_pack, (*parts, fmt.name))
    packed = ops.int4_linear_pack(*parts, fmt.name)
    end = (*[None] * 6, "int8", fmt.name, 6, "none", torch.float32, "")
    codes, scale = x.codes.to(DEVICE), x.scale.to(DEVICE)
    torch.library.opcheck(ops.int4_linear, (codes, scale, None, packed, *end))
