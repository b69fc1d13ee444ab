"""Codes of 8-bit floats out of Triton, byte for byte those of the specification."""

from __future__ import annotations

import pytest
import torch

import mpq_fx.kernels.quantize.triton  # noqa: F401 - registers the ops
from mpq_fx import plugins
from mpq_fx.formats import TENSOR, Float, Format, format_named
from mpq_fx.numerics import grid, quantize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ops = torch.ops.mpq_triton
# Beside those of the table, to see that nothing depends on which 8-bit float it is.
e5m2_tensor = Format("e5m2_tensor", Float(5, 2), scale=torch.float32, block=TENSOR)
e5m2 = Format("e5m2", Float(5, 2), scale=torch.float32)
PER_TENSOR = pytest.mark.parametrize("name", ["fp8_e4m3_tensor", "e5m2_tensor"])
PER_ROW = pytest.mark.parametrize("name", ["fp8_e4m3", "e5m2"])

# Division by zero, by infinity and of NaN are part of the tests; numpy remarks on them.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in divide:RuntimeWarning")


@pytest.fixture(autouse=True)
def further_formats():
    for fmt in (e5m2_tensor, e5m2):
        plugins.add("formats", fmt.name, f"{__name__}:{fmt.name}")
    yield
    plugins.forget()


def same_bytes(got: torch.Tensor, want: torch.Tensor) -> bool:
    return got.dtype == want.dtype and torch.equal(got.view(torch.uint8), want.view(torch.uint8))


def everything(fmt: Format) -> torch.Tensor:
    """Every bfloat16, NaN and infinity among them; each value of the format, each tie, and the
    float32 numbers beside a tie.
    """
    half = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).float()
    values, _ = grid(fmt.element)
    tie = ((values[1:] + values[:-1]) / 2).float()
    beside = (tie.nextafter(tie + 1), tie.nextafter(tie - 1))
    return torch.cat([half, values.float(), tie, *beside]).to(DEVICE)


@PER_TENSOR
@pytest.mark.parametrize("scale", [1.0, 0.37, 2.0**-20])
def test_every_value_and_tie_has_the_code_of_the_specification(name, scale):
    fmt = format_named(name)
    x, number = everything(fmt), torch.tensor(scale, device=DEVICE)
    if scale == 2.0**-20:
        x = x * number  # ties among float32's subnormal neighbors
    zero = torch.tensor(0, dtype=torch.int32, device=DEVICE)
    assert same_bytes(ops.quantize(x, number, zero, name), quantize(x, fmt, number).codes)


@PER_ROW
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 300), (2, 3, 17), (0, 8), (3, 0)], ids=str)
def test_a_row_has_its_own_scale(name, dtype, shape):
    fmt = format_named(name)
    x = (torch.randn(shape) * torch.logspace(-5, 2, shape[-1])).to(DEVICE, dtype)
    codes, scale, zero = ops.quantize_dynamic(x, name)
    want = quantize(x, fmt)
    assert same_bytes(codes, want.codes)
    assert torch.equal(scale, want.scale)
    assert not zero.any()


def test_rows_of_zeros_and_of_extreme_magnitudes():
    rows = [torch.zeros(40), *(m * torch.linspace(-1, 1, 40) for m in (1e-45, 1e-38, 1e-12, 3e38))]
    x = torch.stack(rows).to(DEVICE)
    want = quantize(x, format_named("fp8_e4m3"))
    codes, scale, _ = ops.quantize_dynamic(x, "fp8_e4m3")
    assert torch.equal(scale, want.scale)
    assert same_bytes(codes, want.codes)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("k", [40, 20000])
@pytest.mark.parametrize("name", ["fp8_e4m3", "int8"])
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")
def test_a_value_without_a_scale_shows_up_in_its_row_and_no_other(poison, k, name):
    x = torch.randn(3, k, device=DEVICE)
    x[1, k // 2] = poison
    codes, scale, _ = ops.quantize_dynamic(x, name)
    assert scale.isfinite().flatten().tolist() == [True, False, True]
    assert not (codes.float() * scale)[1].isfinite().any()


def test_a_row_too_long_for_registers():
    x = torch.randn(2, 20000, device=DEVICE)
    want = quantize(x, format_named("fp8_e4m3"))
    codes, scale, _ = ops.quantize_dynamic(x, "fp8_e4m3")
    assert torch.equal(scale, want.scale)
    assert same_bytes(codes, want.codes)


def test_any_strides():
    x = torch.randn(6, 5, 40, device=DEVICE)
    for view in (x.transpose(0, 2), x[::2, :, 1::3], x[:, :1].expand(6, 3, 40)):
        codes, scale, _ = ops.quantize_dynamic(view, "fp8_e4m3")
        want = quantize(view, format_named("fp8_e4m3"))
        assert torch.equal(scale, want.scale)
        assert same_bytes(codes, want.codes.contiguous())
