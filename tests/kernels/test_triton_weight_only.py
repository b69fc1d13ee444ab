"""mpq_triton::weight_only_linear against mpq::linear on the same codes, and proof that it bites."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

import mpq_fx.kernels  # noqa: F401 - registers the ops
from mpq_fx.formats import FORMATS, Float, Format, Int
from mpq_fx.kernels.linear import triton_weight_only
from mpq_fx.kernels.linear.triton_epilogue import Epilogue
from mpq_fx.kernels.linear.triton_linear import Call, Shape
from mpq_fx.kernels.linear.triton_weight_only import TILES, WEIGHT_ONLY, listed, tile
from mpq_fx.kernels.tile import ROOMY, Machine, Tile
from mpq_fx.numerics import Quantized, dequantize, quantize, relative_rms
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

NAMES = ("int8", "int8_asym", "int8_tensor", "int8_g128", "int4", "int4_g32", "int4_row")
FMTS = [*(FORMATS[name] for name in NAMES), FORMATS["int4_asym"], FORMATS["int7_tensor"]]
FLOAT8S = [FORMATS["fp8_e4m3"], FORMATS["fp8_e4m3_tensor"]]
ODD = [  # groups that no power of two divides, and two in 16 bytes; floats that no choice has
    Format("fp8_e5m2_g48", Float(5, 2), torch.float32, 48),
    Format("int4_g16", Int(4), torch.float16, 16),
    Format("int4_g48", Int(4), torch.float16, 48, symmetric=False),
    Format("int8_g48", Int(8), torch.float32, 48, symmetric=False),
]
# One per path: vector units, tensor cores; K whole, and split
VECTOR, VECTOR_SPLIT = Tile(4, 32, 128, 1, 4, 1), Tile(4, 32, 64, 1, 4, 1, 2)
ONE_ROW, TWO_ROWS = Tile(1, 16, 64, 1, 4, 1), Tile(2, 16, 64, 1, 4, 1)
CORES, CORES_SPLIT = Tile(16, 16, 64, 2, 4, 1), Tile(16, 16, 64, 1, 4, 1, 3)
PATHS = {"vector": VECTOR, "vector_split": VECTOR_SPLIT, "cores": CORES, "split": CORES_SPLIT}
paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
fmts = pytest.mark.parametrize("fmt", FMTS + FLOAT8S, ids=str)
H100 = Machine("sm_90", 132, 227 << 10)


def weight(n: int, k: int, fmt: Format) -> Quantized:
    return quantize(torch.randn(n, k) * torch.logspace(-1, 1, max(k, 1))[:k], fmt)


def run(x, w: Quantized, fmt: Format, *, path=None, bias=None, x_fmt="bfloat16", after=None):
    parts = (part.to(DEVICE) for part in (w.codes, w.scale, w.zero))
    packed = triton_weight_only.pack(*parts, fmt)
    after = after or Epilogue(torch.float32, bias)
    x, n = x.to(DEVICE), w.codes.shape[0]
    call = Call(x, None, None, packed, FORMATS[x_fmt], fmt, n, after, path)
    return WEIGHT_ONLY.launch(call).cpu()


def want(x, w: Quantized, fmt: Format, bias=None, x_fmt="bfloat16") -> torch.Tensor:
    """In float64; `mpq::linear` does the same, for formats of the table."""
    values = x.to(FORMATS[x_fmt].dtype).double() @ exactly(w, fmt).T
    return values if bias is None else values + bias.cpu().double()


def exactly(w: Quantized, fmt: Format) -> torch.Tensor:
    return dequantize(Quantized(w.codes, w.scale.double(), w.zero), fmt).double()


@fmts
@paths
@pytest.mark.parametrize("shape", [(1, 17, 129), (17, 15, 200)], ids=str)
def test_equals_the_reference(shape, path, fmt):
    m, n, k = shape
    x, w = torch.randn(m, k).bfloat16(), weight(n, k, fmt)
    bias = torch.randn(n, device=DEVICE)
    empty = torch.empty(0), torch.empty(0, dtype=torch.int32)
    parts = (x, *empty, w.codes, w.scale, w.zero, bias.cpu())
    reference = torch.ops.mpq.linear(*parts, "bfloat16", fmt.name, torch.float32)
    assert relative_rms(run(x, w, fmt, path=path, bias=bias), reference) <= limit(k)


@paths
@pytest.mark.parametrize("fmt", ODD, ids=str)
def test_groups_of_any_multiple_of_sixteen(fmt, path):
    x, w = torch.randn(3, 137).bfloat16(), weight(17, 137, fmt)
    assert relative_rms(run(x, w, fmt, path=path), want(x, w, fmt)) <= limit(137)


@paths
@settings(max_examples=6)
@given(
    m=st.integers(1, 20),
    n=st.integers(1, 20),
    k=st.integers(1, 150),
    fmt=st.sampled_from(FMTS + FLOAT8S),
)
def test_any_shape(path, m, n, k, fmt):
    x, w = torch.randn(m, k).bfloat16(), weight(n, k, fmt)
    assert relative_rms(run(x, w, fmt, path=path), want(x, w, fmt)) <= limit(k)


@pytest.mark.parametrize("path", [ONE_ROW, TWO_ROWS, CORES_SPLIT], ids=["one", "two", "split"])
@pytest.mark.parametrize("k", [1, 15, 16, 17, 127, 128, 129])
def test_any_length_of_a_row(path, k):
    for fmt in (FORMATS["int4_asym"], FORMATS["int8"]):
        x, w = torch.randn(2, k).bfloat16(), weight(3, k, fmt)
        assert relative_rms(run(x, w, fmt, path=path), want(x, w, fmt)) <= limit(k)


@pytest.mark.parametrize("x_fmt", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_activations_are_rounded_to_their_format_and_no_further(dtype, x_fmt):
    fmt, k = FORMATS["int4"], 200
    x, w = torch.randn(5, k).to(dtype), weight(9, k, fmt)
    for path in (VECTOR, CORES):
        got = run(x, w, fmt, path=path, x_fmt=x_fmt)
        assert relative_rms(got, want(x, w, fmt, x_fmt=x_fmt)) <= limit(k)


def test_every_code_and_zero_point_is_widened_exactly_at_every_place():
    for bits, fmt in ((4, FORMATS["int4_asym"]), (8, FORMATS["int8_asym"])):
        half, k = 1 << bits - 1, 128 // bits  # every place of the 16 bytes of a load
        codes = torch.arange(-half, half, dtype=torch.int8)[:, None].repeat(1, k)
        scale, eye = torch.ones(2 * half, 1, dtype=fmt.scale), torch.eye(k).bfloat16()
        for zero in (-half, half - 1):
            w = Quantized(codes, scale, torch.full_like(scale, zero, dtype=torch.int32))
            for path in (Tile(4, 128, 64, 1, 4, 1), Tile(16, 128, 32, 1, 4, 1)):
                got = run(eye, w, fmt, path=path)
                assert torch.equal(got, codes.float().T - zero)


@pytest.mark.parametrize("x_fmt", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_every_finite_float_is_widened_exactly_at_every_place(dtype, x_fmt):
    element = Float(4, 3, "nan") if dtype == torch.float8_e4m3fn else Float(5, 2)
    fmt, k = Format("fp8", element, torch.float32), 16
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    codes = codes[codes.float().isfinite()]
    w = Quantized(codes[:, None].repeat(1, k), torch.ones(len(codes), 1), torch.zeros(()).int())
    for path in (Tile(4, 128, 64, 1, 4, 1), Tile(16, 128, 32, 1, 4, 1)):
        got = run(torch.eye(k), w, fmt, path=path, x_fmt=x_fmt)
        assert torch.equal(got, codes.float().repeat(k, 1))


BUGS = [
    (swap_nibbles, "int4"),
    (swap_nibbles, "int4_asym"),
    (next_group_scale, "int4_g32"),
    (next_row_scale, "int8"),
    (drop_last_block, "int4"),
    (drop_last_block, "int8"),
    (bump_one_code, "int4_row"),
    (bump_one_code, "int8_g128"),
    (next_row_scale, "fp8_e4m3"),
    (drop_last_block, "fp8_e4m3"),
]


@paths
@pytest.mark.parametrize(("bug", "name"), BUGS, ids=lambda part: getattr(part, "__name__", part))
def test_a_broken_weight_is_caught(bug, name, path):
    fmt, k = FORMATS[name], 320
    x, w = torch.randn(8, k).bfloat16(), weight(6, k, fmt)
    assert relative_rms(run(x, w, fmt, path=path), want(x, w, fmt)) <= limit(k)
    broken = run(x, bug(w, fmt), fmt, path=path)
    assert relative_rms(broken, want(x, w, fmt)) > limit(k)


@pytest.mark.parametrize("base", [VECTOR_SPLIT, CORES], ids=["vector", "cores"])
def test_splits_of_k_agree_and_repeat_bit_for_bit(base):
    fmt, k = FORMATS["int4"], 500
    x, w = torch.randn(3, k).bfloat16(), weight(10, k, fmt)
    found = []
    for split in (1, 2, 3, 16):  # of the last, some programs have nothing to sum
        path = replace(base, split_k=split)
        first, again = (run(x, w, fmt, path=path) for _ in range(2))
        assert torch.equal(first, again)
        found.append(first)
    assert all(relative_rms(y, found[0]) <= limit(k) for y in found)


def test_any_strides():
    fmt = FORMATS["int4_g32"]
    x, w = torch.randn(70, 9).bfloat16().t(), weight(11, 140, fmt)
    wide = torch.randn(9, 280).bfloat16()[:, ::2]
    loose = Quantized(*(part.t().contiguous().t() for part in (w.codes, w.scale, w.zero)))
    for path in PATHS.values():
        assert torch.equal(run(wide, loose, fmt, path=path), run(wide.clone(), w, fmt, path=path))
        short = Quantized(w.codes[:, :70], w.scale[:, :3], w.zero[:, :3])
        assert torch.equal(
            run(x, short, fmt, path=path), run(x.contiguous(), short, fmt, path=path)
        )


@pytest.mark.parametrize("strides", FAR.values(), ids=FAR)
def test_offsets_have_64_bits(strides):
    fmt, x = FORMATS["int8"], torch.randn(2, 128).bfloat16()
    w, far = weight(5, 128, fmt), far_apart(x, strides)
    for path in (Tile(2, 16, 64, 1, 4, 1), CORES):
        assert relative_rms(run(far, w, fmt, path=path), want(x, w, fmt)) <= limit(128)


@pytest.mark.parametrize("shape", [(0, 40), (2, 0, 40), (40,), (2, 3, 40), (3, 0)], ids=str)
def test_any_leading_shape_and_nothing_at_all(shape):
    fmt, k = FORMATS["int4"], shape[-1]
    x, w = torch.randn(shape), weight(6, k, fmt)
    bias, op = torch.randn(6, device=DEVICE), torch.ops.mpq_triton.weight_only_linear
    packed = torch.ops.mpq_triton.weight_only_linear_pack(
        *(part.to(DEVICE) for part in (w.codes, w.scale, w.zero)), fmt.name
    )
    end = (*[None] * 5, "float32", fmt.name, 6, "none", torch.float32, "")
    got = op(x.to(DEVICE), None, None, packed, bias, *end).cpu()
    assert got.shape == (*shape[:-1], 6)
    torch.testing.assert_close(got, want(x, w, fmt, bias, "float32").float())


@paths
def test_what_follows_a_linear_follows_a_split_one_too(path):
    fmt, k = FORMATS["int8_g128"], 300
    x, w = torch.randn(5, k).bfloat16(), weight(12, k, fmt)
    addend = torch.randn(5, 12)
    scale = torch.tensor(0.1, device=DEVICE)
    zero = torch.tensor(3, dtype=torch.int32, device=DEVICE)
    end = (addend.to(DEVICE), None, None, "relu", FORMATS["uint8_tensor"], scale, zero)
    got = run(x, w, fmt, path=path, after=Epilogue(torch.float32, None, *end))
    plain = torch.relu(run(x, w, fmt, path=path) + addend)
    expected = torch.clamp(torch.round(plain / 0.1) + 3, 0, 255)
    assert got.dtype == torch.uint8
    assert int((got.int() - expected.int()).abs().max()) <= 1, "a sum on the edge of two codes"
    assert float((got.int() == expected.int()).float().mean()) > 0.95


def test_a_tile_has_one_scale_per_step_and_fits():
    small = Machine("sm_86", 82, 99 << 10)
    for fmt in FMTS + ODD:
        for m in (1, 2, 3, 16, 17, 64, 65, 5000):
            for at in (H100, small):
                assert listed(m, fmt, at)
                cut = tile(m, 4096, 4096, fmt, at)
                assert cut.block_m >= min(m, 64)
                one = cut.block_k <= 32 or fmt.block <= 0 or fmt.block % cut.block_k == 0
                assert one or cut.block_m <= 4
                assert cut.split_k == 1 or m <= 64


def test_few_rows_fill_the_device_by_splitting_k():
    fmt = FORMATS["int4"]
    cut = tile(16, 4096, 14336, fmt, H100)
    assert 132 <= cut.count(16, 4096) <= 2 * 132
    assert tile(16, 128256, 4096, fmt, H100).split_k == 1
    assert tile(16, 64, 128, fmt, H100).split_k == 1, "there is nothing to split"


def test_a_search_knows_the_table_and_more():
    for m in (1, 16, 1000):
        found = WEIGHT_ONLY.configurations(m, 4096, 4096, H100)
        rows = next((rows for rows in TILES if m <= rows), 0)
        assert len(set(found)) == len(found) >= 4
        assert {t.block_m for t in found} == {t.block_m for t in TILES[rows]}
        assert max(t.values for t in found) <= ROOMY, "more of them spill"


def test_refusals_say_why():
    def said(x: str, fmt: Format) -> list[str]:
        return [*WEIGHT_ONLY.refuse(Shape(FORMATS[x], fmt, 1, 64, 64, H100))]

    assert said("bfloat16", FORMATS["int4"]) == said("float32", ODD[2]) == []
    assert said("int8", FORMATS["int8"]) == [
        "activations are bfloat16, float16 or float32 here, not int8"
    ]
    (groups,) = said("bfloat16", Format("g24", Int(4), torch.float16, 24))
    assert groups == "groups are multiples of 16 here, and those of g24 are 24"
    assert "signed" in said("bfloat16", FORMATS["uint8_tensor"])[0]
    assert said("bfloat16", FORMATS["fp8_e4m3"]) == said("bfloat16", ODD[0]) == []
    assert "signed" in said("bfloat16", FORMATS["bfloat16"])[0]
    assert "two levels" in said("bfloat16", FORMATS["int4_progressive"])[0]


def test_the_ops_keep_their_contract():
    fmt = FORMATS["int4_asym"]
    w = weight(6, 40, fmt)
    parts = [part.to(DEVICE) for part in (w.codes, w.scale, w.zero)]
    ops = torch.ops.mpq_triton
    torch.library.opcheck(ops.weight_only_linear_pack, (*parts, fmt.name))
    packed = ops.weight_only_linear_pack(*parts, fmt.name)
    end = (*[None] * 5, "bfloat16", fmt.name, 6, "none", torch.float32, "")
    x = torch.randn(3, 40, device=DEVICE).bfloat16()
    torch.library.opcheck(ops.weight_only_linear, (x, None, None, packed, None, *end))
