"""The Triton kernel of 8-bit floats against mpq::linear on the same codes; the limit bites."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mpq_fx.kernels  # noqa: F401 - registers the ops
from mpq_fx.formats import FORMATS, Format
from mpq_fx.kernels.linear import triton_float8
from mpq_fx.kernels.linear.triton_epilogue import Epilogue
from mpq_fx.kernels.linear.triton_float8 import FLOAT8, LONGEST
from mpq_fx.kernels.linear.triton_linear import Call, Shape
from mpq_fx.kernels.tile import Machine, Tile, machine
from mpq_fx.numerics import Quantized, dequantize, quantize, relative_rms
from tests.kernels.tolerance import FAR, far_apart

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROW, TENSOR = FORMATS["fp8_e4m3"], FORMATS["fp8_e4m3_tensor"]
SMALL = Tile(16, 16, 32, 2, 4, 2)  # 32 is the least K of an instruction
IS_EXACT = DEVICE.type == "cpu" or not triton_float8.is_promoted(machine(DEVICE))


def limit(k: int, block_k: int = SMALL.block_k) -> float:
    """Of float32 results: their roundoff, that of float32 sums, and that of a tensor core's."""
    in_core = 0.0 if IS_EXACT else math.sqrt(min(k, block_k)) * 2**-13
    return 2**-24 + math.sqrt(k) * 2**-24 + in_core


def sample(m: int, n: int, k: int, *, fx: Format = ROW, fw: Format = ROW):
    w = torch.randn(n, k, device=DEVICE)
    x = torch.randn(m, k, device=DEVICE) + 0.2
    return quantize(x, fx), quantize(w, fw)


def run(x: Quantized, w: Quantized, *, fx: Format = ROW, fw: Format = ROW, tile=SMALL, **after):
    """The kernel as the op calls it: on [rows, K] and what its own `pack` made of the weight."""
    epilogue = Epilogue(after.pop("dtype", torch.float32), **after)
    packed = FLOAT8.pack(w.codes, w.scale, w.zero, fw)
    scale = x.scale.reshape(-1)
    return FLOAT8.launch(Call(x.codes, scale, None, packed, fx, fw, len(w.codes), epilogue, tile))


def reference(x: Quantized, w: Quantized, bias=None, *, fx: Format = ROW, fw: Format = ROW):
    parts = (x.codes, x.scale, x.zero, w.codes, w.scale, w.zero, bias)
    return torch.ops.mpq.linear(*parts, fx.name, fw.name, torch.float32)


# --- the sum


@pytest.mark.parametrize("k", [1, 31, 32, 33, 100, 256])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 17), (15, 16), (17, 33), (129, 5)], ids=str)
def test_equals_the_reference_on_the_same_codes(m, n, k):
    x, w = sample(m, n, k)
    assert relative_rms(run(x, w), reference(x, w)) <= limit(k)


@pytest.mark.parametrize("fx", [ROW, TENSOR], ids=str)
@pytest.mark.parametrize("fw", [ROW, TENSOR], ids=str)
def test_a_scale_per_row_or_per_tensor(fx, fw):
    x, w = sample(20, 18, 70, fx=fx, fw=fw)
    want = reference(x, w, fx=fx, fw=fw)
    assert relative_rms(run(x, w, fx=fx, fw=fw), want) <= limit(70)


@settings(max_examples=12)
@given(
    m=st.integers(1, 40), n=st.integers(1, 40), k=st.integers(1, 90), tile=st.sampled_from(
        [SMALL, Tile(32, 16, 32, 1), Tile(16, 32, 64, 3, 4, 1), Tile(32, 32, 128, 8)]
    )
)  # fmt: skip
def test_any_size_in_any_tile(m, n, k, tile):
    x, w = sample(m, n, k)
    assert relative_rms(run(x, w, tile=tile), reference(x, w)) <= limit(k, tile.block_k)


@pytest.mark.parametrize("at", ["own sums", "sums of the tensor core"])
def test_both_ways_to_sum(at, monkeypatch):
    own = (machine(DEVICE).architecture,) if at == "sums of the tensor core" else ()
    monkeypatch.setattr(triton_float8, "EXACT", own)
    x, w = sample(17, 20, 200)
    in_core = 0.0 if IS_EXACT else math.sqrt(200) * 2**-13
    assert relative_rms(run(x, w), reference(x, w)) <= limit(200) + in_core


def test_every_product_of_two_codes_is_exact():
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(ROW.dtype)
    codes = codes[codes.float().isfinite()].view(-1, 1)
    x = unit(codes)
    want = codes.float() @ codes.float().T
    for y in (run(x, x, tile=SMALL), run(x, x, tile=Tile(64, 64, 32))):
        assert torch.equal(y, want)


def unit(codes: torch.Tensor) -> Quantized:
    ones = torch.ones(len(codes), 1, device=DEVICE)
    return Quantized(codes, ones, ones.int() - 1)


def test_scales_multiply_in_the_order_of_the_reference():
    x, w = (torch.randint(-8, 9, (n, 64), device=DEVICE).to(ROW.dtype) for n in (9, 7))
    scales = [torch.rand(len(codes), 1, device=DEVICE) for codes in (x, w)]
    x, w = (replace(unit(c), scale=s) for c, s in zip((x, w), scales, strict=True))
    assert torch.equal(run(x, w), reference(x, w)), "the sum itself is exact here"


def test_any_strides():
    x, w = sample(9, 7, 70)
    want = run(x, w)
    wide = torch.empty(18, 140, dtype=ROW.dtype, device=DEVICE)
    for loose in (wide[::2, ::2], wide[:9, 70:], wide.view(140, 18)[:70, :9].t()):
        loose.copy_(x.codes)
        assert torch.equal(run(replace(x, codes=loose), w), want)
    turned = replace(w, codes=w.codes.t().contiguous().t(), scale=w.scale.expand(7, 3)[:, 1:2])
    assert torch.equal(run(x, turned), want)


@pytest.mark.parametrize("strides", FAR.values(), ids=FAR)
def test_offsets_have_64_bits(strides):
    x, w = sample(2, 5, 128)
    far, tile = replace(x, codes=far_apart(x.codes, strides)), replace(SMALL, block_k=64)
    assert torch.equal(run(far, w, tile=tile), run(x, w, tile=tile))


def test_reads_nothing_beside_its_operand():
    x, w = sample(9, 7, 70)
    wide = torch.full((9, 140), 0x7F, dtype=torch.uint8, device=DEVICE).view(ROW.dtype)  # NaN
    wide[:, :70] = x.codes
    assert torch.equal(run(replace(x, codes=wide[:, :70]), w), run(x, w))


@pytest.mark.parametrize("shape", [(0, 40), (2, 0, 40), (40,), (2, 3, 40)], ids=str)
def test_the_op_takes_any_leading_shape_and_no_rows_at_all(shape):
    x = quantize(torch.randn(shape, device=DEVICE), ROW)
    w = quantize(torch.randn(6, 40, device=DEVICE), ROW)
    packed = torch.ops.mpq_triton.float8_linear_pack(w.codes, w.scale, w.zero, ROW.name)
    nothing = (None,) * 6
    how = (ROW.name, ROW.name, 6, "none", torch.float32, "")
    scale = x.scale.reshape(-1)
    y = torch.ops.mpq_triton.float8_linear(x.codes, scale, None, packed, *nothing, *how)
    assert y.shape == (*shape[:-1], 6)
    want = dequantize(x, ROW).double() @ dequantize(w, ROW).double().T
    assert relative_rms(y, want) <= limit(40, LONGEST)


# --- what follows the sum


def exact(m: int, n: int, k: int = 64) -> tuple[Quantized, Quantized]:
    """Operands whose results are exact in float32, so that codes of them are comparable."""
    parts = (torch.randint(-4, 5, (rows, k), device=DEVICE).to(ROW.dtype) for rows in (m, n))
    x, w = (replace(unit(codes), scale=torch.full((len(codes), 1), 0.5)) for codes in parts)
    return replace(x, scale=x.scale.to(DEVICE)), replace(w, scale=w.scale.to(DEVICE))


@pytest.mark.parametrize("name", ["fp8_e4m3_tensor", "int8_tensor", "uint8_tensor"])
def test_results_are_quantized_like_the_reference_does(name):
    fmt, (x, w) = FORMATS[name], exact(33, 18)
    bias = torch.randint(-9, 9, (18,), device=DEVICE).float()
    y = reference(x, w, bias).relu()
    q = quantize(y - 1.0, fmt)  # a zero point where the format has one
    kind = {"out_fmt": fmt, "out_scale": q.scale, "out_zero": q.zero}
    got = run(x, w, bias=bias, activation="relu", **kind)
    want = quantize(y, fmt, q.scale, q.zero).codes
    assert got.dtype == fmt.dtype
    assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


@pytest.mark.parametrize("name", ["float32", "bfloat16", "fp8_e4m3_tensor", "uint8_tensor"])
def test_adds_a_residual_in_floats_or_codes(name):
    fmt, (x, w) = FORMATS[name], exact(20, 17)
    q = quantize(torch.randn(20, 17, device=DEVICE) + 0.5, fmt)
    parts = {} if fmt.is_plain else {"addend_scale": q.scale, "addend_zero": q.zero}
    got = run(x, w, addend=q.codes, **parts)
    torch.testing.assert_close(got, reference(x, w) + dequantize(q, fmt))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_in_sixteen_bits_are_rounded_once(dtype):
    x, w = exact(20, 17)
    assert torch.equal(run(x, w, dtype=dtype), reference(x, w).to(dtype))


# --- injected bugs


def next_row_scale(q: Quantized) -> Quantized:
    return replace(q, scale=q.scale.roll(1, 0))


def drop_last_block(q: Quantized) -> Quantized:
    codes = q.codes.clone()
    codes[:, -SMALL.block_k :] = 0
    return replace(q, codes=codes)


def bump_one_code_per_row(q: Quantized) -> Quantized:
    """To the next magnitude, which is the next byte."""
    codes = q.codes.clone()
    place = codes.view(torch.int8)
    place[:, -1] += torch.where(codes[:, -1].float().abs() < ROW.max, 1, -1).to(torch.int8)
    return replace(q, codes=codes)


def flip_one_sign(q: Quantized) -> Quantized:
    codes = q.codes.clone()
    codes.view(torch.uint8)[0, 0] ^= 128
    return replace(q, codes=codes)


BUGS = (next_row_scale, drop_last_block, bump_one_code_per_row, flip_one_sign)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
@pytest.mark.parametrize("k", [64, 1024])
def test_a_broken_operand_is_caught(bug, k):
    x, w = sample(16, 12, k)
    want = reference(x, w)
    assert relative_rms(run(x, w), want) <= limit(k)
    assert relative_rms(run(x, bug(w)), want) > limit(k)
    assert relative_rms(run(bug(x), w), want) > limit(k)


# --- who takes it, and how exact a tensor core is


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("sm_80", "sm_80 multiplies no 8-bit floats; sm_89 and later do"),
        ("sm_86", "sm_86 multiplies no 8-bit floats; sm_89 and later do"),
        *((name, "") for name in ("sm_89", "sm_90", "sm_100", "sm_120")),
    ],
)
def test_architectures_without_eight_bit_floats_are_refused(architecture, reason):
    at = Machine(architecture, 100, 99 * 1024)
    shape = Shape(ROW, ROW, 16, 64, 64, at, "dynamic")
    assert "; ".join(FLOAT8.refuse(shape)) == reason


@pytest.mark.parametrize(
    ("fx", "fw", "what"),
    [("int8", "fp8_e4m3", "activations"), ("fp8_e4m3", "int8", "weights")],
)
def test_other_formats_are_refused_by_name(fx, fw, what):
    at = Machine("sm_90", 132, 227 * 1024)
    (reason,) = FLOAT8.refuse(Shape(FORMATS[fx], FORMATS[fw], 16, 64, 64, at))
    assert reason == f"{what} are 8-bit floats with a scale per row or tensor here, not int8"
    both = [*FLOAT8.refuse(Shape(FORMATS["bfloat16"], FORMATS["int4"], 16, 64, 64, at))]
    assert len(both) == 2


@pytest.mark.parametrize("name", ["sm_89", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("m", [1, 16, 17, 64, 200, 4096])
def test_every_tile_fits_and_sums_no_further_than_promised(name, m):
    at = Machine(name, 100, (99 if name in ("sm_89", "sm_120") else 227) * 1024)
    plain, after = (
        triton_float8.tile(m, 4096, 4096, at, is_plain=is_plain) for is_plain in (True, False)
    )
    tiles = (plain, after, *FLOAT8.configurations(m, 4096, 4096, at))
    assert len(tiles) > 4
    assert all(t.shared_bytes(1, 1) <= at.shared and t.block_k <= LONGEST for t in tiles)
    assert max(t.values for t in tiles) <= (128 if name == "sm_100" else 64), "more of them spill"
    assert after.values <= 64


def cut(sums: torch.Tensor) -> torch.Tensor:
    """float64 with 13 bits of mantissa left, the rest cut off: the running sum of a tensor core."""
    mantissa, exponent = torch.frexp(sums)
    return torch.ldexp(torch.trunc(mantissa * 2**14) / 2**14, exponent)


def summed(products: torch.Tensor, promoted: int) -> torch.Tensor:
    """Σ over the last dimension, 32 at a time in 13 bits; every `promoted` of them to float32."""
    total = torch.zeros(products.shape[0])
    for part in products.split(promoted, -1):
        running = torch.zeros(products.shape[0], dtype=torch.float64)
        for step in part.split(32, -1):
            running = cut(running + step.sum(-1))
        total += running.float()
    return total


def test_sums_of_thirteen_bits_keep_the_limit_only_if_promoted():
    """The claim of the kernel's docstring, on a model of the tensor core."""
    k = 8192
    x, w = (quantize(torch.rand(256, k), ROW) for _ in range(2))  # a sum that grows
    products = x.codes.double() * w.codes.double()
    want = products.sum(-1)
    allowed = math.sqrt(LONGEST) * 2**-13 + math.sqrt(k) * 2**-24
    assert relative_rms(summed(products, LONGEST), want) <= allowed
    assert relative_rms(summed(products, k), want) > allowed
