"""mpq::linear against float64 arithmetic on the same codes, and proof that the limit bites."""

from __future__ import annotations

import pytest
import torch

import mpq_fx.kernels  # noqa: F401 - registers the ops
from mpq_fx.formats import FORMATS, Format
from mpq_fx.numerics import Quantized, quantize, relative_rms, spread
from tests.kernels.tolerance import (
    UNIT_ROUNDOFF,
    bump_one_code,
    drop_last_block,
    limit,
    next_group_scale,
    swap_nibbles,
)

linear = torch.ops.mpq.linear
X_FORMATS = pytest.mark.parametrize("fx", FORMATS.values(), ids=lambda fmt: f"x={fmt}")
W_FORMATS = pytest.mark.parametrize("fw", FORMATS.values(), ids=lambda fmt: f"w={fmt}")


def value(q: Quantized, fmt: Format) -> torch.Tensor:
    """(codes - zero) * scale, written again in float64."""
    if fmt.is_plain:
        return q.codes.double()
    k = q.codes.shape[-1]
    return (q.codes.double() - spread(q.zero, fmt, k)) * spread(q.scale, fmt, k).double()


def call(x: Quantized, w: Quantized, bias, *, fx: Format, fw: Format, out=torch.float32):
    parts = (x.codes, x.scale, x.zero, w.codes, w.scale, w.zero)
    return linear(*parts, bias, fx.name, fw.name, out)


def sample(m: int, n: int, k: int, *, fx: Format, fw: Format) -> tuple[Quantized, Quantized]:
    w = torch.randn(n, k) * torch.logspace(-1, 1, k)  # groups of different size
    return quantize(torch.randn(m, k) + 0.3, fx), quantize(w, fw)


@X_FORMATS
@W_FORMATS
def test_equals_float64_arithmetic_on_the_same_codes(fx, fw):
    x, w = sample(9, 7, 300, fx=fx, fw=fw)
    bias = torch.randn(7)
    want = value(x, fx) @ value(w, fw).T + bias.double()
    for out in UNIT_ROUNDOFF:
        got = call(x, w, bias, fx=fx, fw=fw, out=out)
        assert got.dtype == out
        assert relative_rms(got, want) <= limit(300, out)


BUGS = [
    (swap_nibbles, ["int4", "int4_g32", "int4_row", "int4_asym"]),
    (next_group_scale, ["int4", "int4_g32", "int4_asym", "int8_g128"]),
    (drop_last_block, [fmt.name for fmt in FORMATS.values() if not fmt.is_plain]),
    (bump_one_code, [fmt.name for fmt in FORMATS.values() if not fmt.is_plain]),
]


@pytest.mark.parametrize(("bug", "names"), BUGS, ids=[bug.__name__ for bug, _ in BUGS])
@pytest.mark.parametrize("k", [64, 1024, 8192])
@pytest.mark.parametrize("fx", [FORMATS["int8"], FORMATS["float32"]], ids=str)
def test_a_broken_weight_is_caught(bug, names, k, fx):
    for fw in map(FORMATS.__getitem__, names):
        if bug is next_group_scale and fw.groups(k) < 2:
            continue  # there is no other group to confuse
        x, w = sample(8, 5, k, fx=fx, fw=fw)
        want = value(x, fx) @ value(w, fw).T
        assert relative_rms(call(x, w, None, fx=fx, fw=fw), want) <= limit(k, torch.float32)
        broken = call(x, bug(w, fw), None, fx=fx, fw=fw)
        assert relative_rms(broken, want) > limit(k, torch.float32), (fw, k)


def unit(codes: torch.Tensor) -> Quantized:
    return Quantized(codes, torch.tensor(1.0), torch.tensor(0, dtype=torch.int32))


def test_saturated_codes_are_summed_exactly():
    fmt = FORMATS["int8_tensor"]
    codes = torch.full((1, 256), 127, dtype=torch.int8)
    assert call(unit(codes), unit(codes), None, fx=fmt, fw=fmt).item() == 4129024.0


def test_integer_sums_are_exact_beyond_what_float32_holds():
    fmt = FORMATS["int8_tensor"]
    x = torch.randint(100, 128, (4, 4096), dtype=torch.int8)
    w = torch.randint(100, 128, (3, 4096), dtype=torch.int8)
    want = x.long() @ w.long().T
    assert int(want.min()) > 2**24
    assert torch.equal(call(unit(x), unit(w), None, fx=fmt, fw=fmt), want.float())


def test_sums_of_eight_bit_floats_are_exact():
    fmt = FORMATS["fp8_e4m3_tensor"]
    least, largest = fmt.element.value(1), fmt.max
    codes = torch.tensor([[least, *[largest] * 4096, -least]]).to(fmt.dtype)
    weight = torch.tensor([[least, *[largest, -largest] * 2048, 0.0]]).to(fmt.dtype)
    assert call(unit(codes), unit(weight), None, fx=fmt, fw=fmt).item() == least * least


def test_scales_multiply_in_a_stated_order():
    fmt = FORMATS["int8"]
    x, w = sample(9, 7, 300, fx=fmt, fw=fmt)
    bias = torch.randn(7)
    total = (x.codes.long() @ w.codes.long().T).float()
    want = total * x.scale * w.scale.T + bias
    assert torch.equal(call(x, w, bias, fx=fmt, fw=fmt), want)


@pytest.mark.parametrize("shape", [(0, 40), (2, 0, 40), (40,), (2, 3, 40), (3, 0)], ids=str)
@pytest.mark.parametrize("names", [("int8", "int4_g32"), ("float32", "int8")], ids=str)
def test_any_leading_shape_and_no_rows_at_all(shape, names):
    fx, fw = (FORMATS[name] for name in names)
    x = quantize(torch.randn(shape), fx)
    w = quantize(torch.randn(6, shape[-1]), fw)
    bias = torch.randn(6)
    got = call(x, w, bias, fx=fx, fw=fw)
    assert got.shape == (*shape[:-1], 6)
    torch.testing.assert_close(got, (value(x, fx) @ value(w, fw).T + bias).float())


def test_any_strides():
    fx, fw = FORMATS["int8_asym"], FORMATS["int4_g32"]
    x, w = sample(9, 7, 100, fx=fx, fw=fw)
    want = call(x, w, None, fx=fx, fw=fw)
    loose = [
        Quantized(q.codes.t().contiguous().t(), q.scale.t().contiguous().t(), q.zero)
        for q in (x, w)
    ]
    torch.testing.assert_close(call(*loose, None, fx=fx, fw=fw), want, rtol=0, atol=0)


def leaves(q: Quantized, fmt: Format, *, exact: bool = False) -> Quantized:
    """The same with its floats leaves of autograd, in float64 for an exact oracle."""
    codes, scale = q.codes, q.scale
    if fmt.is_plain:
        codes = (codes.double() if exact else codes.clone()).requires_grad_()
    else:
        scale = (scale.double() if exact else scale.clone()).requires_grad_()
    return Quantized(codes, scale, q.zero)


@X_FORMATS
@pytest.mark.parametrize(
    "fw", [FORMATS[n] for n in ("int8", "int8_tensor", "int4_asym", "fp8_e4m3", "float32")], ids=str
)
def test_every_float_argument_has_its_exact_derivative(fx, fw):
    x, w = sample(6, 5, 140, fx=fx, fw=fw)
    weights, bias = torch.randn(6, 5), torch.randn(5)

    def derivatives(product, *, exact):
        operands = leaves(x, fx, exact=exact), leaves(w, fw, exact=exact)
        shift = (bias.double() if exact else bias.clone()).requires_grad_()
        floats = [t for q in operands for t in (q.codes, q.scale) if t.requires_grad]
        return torch.autograd.grad((product(*operands, shift) * weights).sum(), [*floats, shift])

    got = derivatives(lambda x, w, b: call(x, w, b, fx=fx, fw=fw), exact=False)
    want = derivatives(lambda x, w, b: value(x, fx) @ value(w, fw).T + b, exact=True)
    assert len(got) == len(want) == 3
    for ours, theirs in zip(got, want, strict=True):
        assert relative_rms(ours, theirs) <= limit(140, ours.dtype)


@pytest.mark.parametrize(
    "names",
    [
        ("int8", "int8"),
        ("uint8_tensor", "int4_asym"),
        ("bfloat16", "int4_g32"),
        ("fp8_e4m3", "fp8_e4m3"),
        ("fp8_e4m3_tensor", "int8"),
    ],
    ids=str,
)
def test_the_op_keeps_its_contract(names):
    fx, fw = (FORMATS[name] for name in names)
    x, w = sample(4, 5, 70, fx=fx, fw=fw)
    x, w = leaves(x, fx), leaves(w, fw)
    parts = (x.codes, x.scale, x.zero, w.codes, w.scale, w.zero)
    bias = torch.randn(5, requires_grad=True)
    arguments = (*parts, bias, fx.name, fw.name, torch.float32)
    if fx.has_float_codes:  # the two others compare by arithmetic that torch does not have for it
        checks = ("test_autograd_registration", "test_faketensor")
        torch.library.opcheck(linear, arguments, test_utils=checks)
    else:
        torch.library.opcheck(linear, arguments)


def test_shapes_that_do_not_fit_are_refused_while_tracing():
    x, w = sample(4, 5, 70, fx=FORMATS["int8"], fw=FORMATS["int8"])
    meta = [t.to("meta") for t in (x.codes[:, :60], x.scale, x.zero, w.codes, w.scale, w.zero)]
    with pytest.raises(RuntimeError, match=r"60.* by .*70"):
        linear(*meta, None, "int8", "int8", torch.float32)
