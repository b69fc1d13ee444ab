"""mpq::quantize, quantize_dynamic, quantize_weight: contract, strides, derivative of the scale."""

from __future__ import annotations

import pytest
import torch

import mpq_fx.kernels  # noqa: F401 - registers the ops
from mpq_fx import numerics
from mpq_fx.errors import ConfigError, UnsupportedError
from mpq_fx.formats import FORMATS

ops = torch.ops.mpq
# opcheck's two others compare by arithmetic that torch does not have for 8-bit floats.
OF_FLOATS = ("test_autograd_registration", "test_faketensor")
CODED = pytest.mark.parametrize("fmt", [f for f in FORMATS.values() if f.scale], ids=str)
VIEWS = {
    "transposed": torch.randn(7, 5).t(),
    "sliced": torch.randn(4, 9)[::2, 1::3],
    "expanded": torch.randn(1, 6).expand(3, 6),
    "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "no rows": torch.randn(0, 6),
    "no columns": torch.randn(3, 0),
    "one row": torch.randn(200),
}


@pytest.mark.parametrize("x", VIEWS.values(), ids=VIEWS.keys())
@CODED
def test_the_ops_are_the_specification_on_any_strides(fmt, x):
    want = numerics.quantize(x, fmt)
    codes, scale, zero = ops.quantize_dynamic(x, fmt.name)
    for got, part in ((codes, want.codes), (scale, want.scale), (zero, want.zero)):
        assert torch.equal(got, part)
        assert got.dtype == part.dtype
    assert torch.equal(ops.quantize(x, scale, zero, fmt.name), want.codes)
    weight = numerics.quantize_weight(x, fmt)
    assert torch.equal(ops.quantize_weight(x, fmt.name)[0], weight.codes)
    assert torch.equal(ops.quantize_weight(x, fmt.name)[1], weight.scale)


@pytest.mark.parametrize("name", ["int8_tensor_asym", "int4_asym"])
@pytest.mark.parametrize("view", ["sliced", "no rows"])
def test_the_ops_keep_their_contract(name, view):
    x, fmt = VIEWS[view], FORMATS[name]
    torch.library.opcheck(ops.quantize, (x, *numerics.scale_and_zero(x, fmt), name))
    torch.library.opcheck(ops.quantize_dynamic, (x, name))
    torch.library.opcheck(ops.quantize_weight, (x, name))


def test_codes_carry_no_gradient():
    x = torch.randn(3, 4, requires_grad=True)
    scale = torch.tensor(0.1, requires_grad=True)
    zero = torch.tensor(0, dtype=torch.int32)
    torch.library.opcheck(ops.quantize, (x, scale, zero, "int8_tensor"))
    assert not ops.quantize(x, scale, zero, "int8_tensor").requires_grad
    codes, scale, zero = ops.quantize_dynamic(x, "int8")
    assert (codes.requires_grad, scale.requires_grad, zero.requires_grad) == (False, True, False)


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e4m3_tensor"])
def test_codes_that_are_floats_carry_no_gradient_either(name):
    x = torch.randn(3, 4, requires_grad=True)
    fixed = [part.requires_grad_(part.is_floating_point()) for part in numbers(x.detach(), name)]
    assert not ops.quantize(x, *fixed, name).requires_grad
    for op in (ops.quantize_dynamic, ops.quantize_weight):
        codes, scale, _ = op(x, name)
        assert (codes.requires_grad, scale.requires_grad) == (False, True)
        (got,) = torch.autograd.grad((codes.float() * scale).sum(), x)
        assert got.abs().sum() > 0
    torch.library.opcheck(ops.quantize, (x, *fixed, name), test_utils=OF_FLOATS)
    torch.library.opcheck(ops.quantize_dynamic, (x, name), test_utils=OF_FLOATS)
    torch.library.opcheck(ops.quantize_weight, (x, name), test_utils=OF_FLOATS)


def numbers(x: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    return numerics.scale_and_zero(x, FORMATS[name])


@pytest.mark.parametrize("fmt", [f for f in FORMATS.values() if f.scale == torch.float32], ids=str)
@pytest.mark.parametrize("op", ["quantize_dynamic", "quantize_weight"])
def test_the_scale_has_its_exact_derivative(op, fmt):
    x = torch.randn(3, 2, 150)
    x[0] = x[0].abs()  # a range that ends at 0
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    _, scale, _ = getattr(ops, op)(a, fmt.name)
    rows = numerics.weight_rows(b) if op == "quantize_weight" else b
    want, _ = numerics.scale_and_zero(rows, fmt)
    weights = torch.rand(scale.shape)
    (got,) = torch.autograd.grad((scale * weights).sum(), a)
    (oracle,) = torch.autograd.grad((want * weights).sum(), b)
    assert got.abs().sum() > 0
    torch.testing.assert_close(got, oracle)


def test_the_derivative_of_a_rounded_scale_ignores_its_rounding():
    x = torch.tensor([[1.0, -3.0, 0.5]], requires_grad=True)
    ops.quantize_weight(x, "int4_row")[1].sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor([[0.0, -1 / 7, 0.0]]))


def test_a_block_of_zeros_has_no_derivative():
    x = torch.zeros(2, 3, requires_grad=True)
    ops.quantize_dynamic(x, "int8_asym")[1].sum().backward()
    assert x.grad is not None
    assert not x.grad.any()


@pytest.mark.parametrize("name", ["int8", "fp8_e4m3"])
def test_the_derivative_survives_tracing(name):
    def loss(x):
        codes, scale, _ = ops.quantize_dynamic(x, name)
        return (codes.float() * scale).sum()

    x = torch.randn(4, 8, requires_grad=True)
    (want,) = torch.autograd.grad(loss(x), x)
    (got,) = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(x), x)
    assert torch.equal(got, want)


def test_formats_without_codes_and_unknown_ones_are_refused():
    with pytest.raises(UnsupportedError, match="bfloat16 is a plain float") as caught:
        ops.quantize_dynamic(torch.randn(2, 3), "bfloat16")
    assert caught.value.fix == "x.to(torch.bfloat16)"
    with pytest.raises(ConfigError, match="unknown format 'int5'"):
        ops.quantize_weight(torch.randn(2, 3), "int5")
