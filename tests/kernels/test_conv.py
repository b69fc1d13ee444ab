"""mpq::conv against float64 convolution of the same values, 1d to 3d."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import mpq_fx.kernels  # noqa: F401 - registers the ops
from mpq_fx.errors import UnsupportedError
from mpq_fx.formats import FORMATS, TENSOR, Format
from mpq_fx.numerics import Quantized, quantize, quantize_weight, relative_rms, spread

conv = torch.ops.mpq.conv
PLAIN = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
WINDOWS = {  # shape of x, shape of w, stride, padding, dilation, groups
    "plain": ((2, 3, 9, 8), (4, 3, 3, 3), [1, 1], [0, 0], [1, 1], 1),
    "pointwise": ((2, 40, 5, 4), (6, 40, 1, 1), [1, 1], [0, 0], [1, 1], 1),
    "strided": ((2, 3, 9, 8), (4, 3, 3, 2), [2, 1], [1, 0], [1, 1], 1),
    "dilated": ((1, 3, 11, 9), (4, 3, 3, 3), [1, 1], [2, 3], [2, 3], 1),
    "grouped": ((2, 6, 7, 7), (4, 3, 3, 3), [1, 1], [1, 1], [1, 1], 2),
    "depthwise": ((2, 6, 7, 7), (6, 1, 3, 3), [2, 2], [1, 1], [1, 1], 6),
    "one dimension": ((2, 6, 17), (4, 3, 5), [2], [4], [2], 2),
    "three dimensions": ((1, 2, 4, 5, 4), (3, 2, 2, 3, 2), [1, 2, 1], [1, 0, 1], [1, 1, 1], 1),
    "no batch": ((0, 3, 9, 8), (4, 3, 3, 3), [1, 1], [1, 1], [1, 1], 1),
}
EVERY_WINDOW = pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS.keys())
ACTIVATIONS = [f for f in FORMATS.values() if f.is_plain or f.block == TENSOR]


def limit(w: torch.Tensor) -> float:
    return 2**-24 * (1 + math.sqrt(w[0].numel()))


def value(q: Quantized, fmt: Format, *, weight: bool = False) -> torch.Tensor:
    """(codes - zero) * scale, written again in float64."""
    if fmt.is_plain:
        return q.codes.double()
    codes = q.codes.double().flatten(1) if weight else q.codes.double()
    k = codes.shape[-1]
    values = (codes - spread(q.zero, fmt, k)) * spread(q.scale, fmt, k).double()
    return values.view(q.codes.shape)


def call(x: Quantized, w: Quantized, bias, window, *, fx: Format, fw: Format, out=torch.float32):
    parts = (x.codes, x.scale, x.zero, w.codes, w.scale, w.zero)
    return conv(*parts, bias, *window[2:], fx.name, fw.name, out)


def sample(window, *, fx: Format, fw: Format) -> tuple[Quantized, Quantized]:
    x = quantize(torch.randn(window[0]) + 0.5, fx)  # off center: zero points are not 0
    return x, quantize_weight(torch.randn(window[1]), fw)


def plain(x: torch.Tensor, w: torch.Tensor, bias, window) -> torch.Tensor:
    return PLAIN[w.ndim - 2](x, w, bias, *window[2:])


@EVERY_WINDOW
@pytest.mark.parametrize("fx", ACTIVATIONS, ids=lambda fmt: f"x={fmt}")
def test_equals_float64_convolution_of_the_same_values(window, fx):
    for fw in FORMATS.values():
        x, w = sample(window, fx=fx, fw=fw)
        bias = torch.randn(window[1][0])
        want = plain(value(x, fx), value(w, fw, weight=True), bias.double(), window)
        got = call(x, w, bias, window, fx=fx, fw=fw)
        assert got.dtype == torch.float32
        assert relative_rms(got, want) <= limit(w.codes), fw


def forget_the_zero_point_in_padding(x: Quantized, window) -> tuple[Quantized, tuple]:
    high, wide = window[3]
    padded = F.pad(x.codes, (wide, wide, high, high))  # with code 0
    return Quantized(padded, x.scale, x.zero), (*window[:3], [0, 0], *window[4:])


def test_broken_operands_are_caught():
    fx, fw, window = FORMATS["uint8_tensor"], FORMATS["int8"], WINDOWS["strided"]
    x, w = sample(window, fx=fx, fw=fw)
    want = plain(value(x, fx), value(w, fw, weight=True), None, window)
    bumped = w.codes.clone()
    bumped[0, 0, 0, 0] += 1 if bumped[0, 0, 0, 0] < 127 else -1
    rolled = Quantized(w.codes, w.scale.roll(1, 0), w.zero)
    broken = [
        call(x, Quantized(bumped, w.scale, w.zero), None, window, fx=fx, fw=fw),
        call(x, rolled, None, window, fx=fx, fw=fw),
    ]
    padded, wider = forget_the_zero_point_in_padding(x, window)
    broken.append(call(padded, w, None, wider, fx=fx, fw=fw))
    assert relative_rms(call(x, w, None, window, fx=fx, fw=fw), want) <= limit(w.codes)
    for y in broken:
        assert relative_rms(y, want) > limit(w.codes)


def test_sums_are_exact_and_scales_multiply_in_a_stated_order():
    fx, fw, window = FORMATS["uint8_tensor"], FORMATS["int8"], WINDOWS["grouped"]
    x, w = sample(window, fx=fx, fw=fw)
    bias = torch.randn(4)
    total = plain(x.codes.double() - x.zero, w.codes.double(), None, window).float()
    want = total * x.scale * w.scale.view(-1, 1, 1) + bias.view(-1, 1, 1)
    assert torch.equal(call(x, w, bias, window, fx=fx, fw=fw), want)


def test_channels_last_gives_the_same_numbers():
    fx, fw, window = FORMATS["uint8_tensor"], FORMATS["int8"], WINDOWS["dilated"]
    x, w = sample(window, fx=fx, fw=fw)
    last = [
        Quantized(q.codes.to(memory_format=torch.channels_last), q.scale, q.zero) for q in (x, w)
    ]
    got = call(*last, None, window, fx=fx, fw=fw)
    assert got.is_contiguous()
    assert torch.equal(got, call(x, w, None, window, fx=fx, fw=fw))


def leaves(q: Quantized, fmt: Format) -> Quantized:
    codes = q.codes.clone().requires_grad_() if fmt.is_plain else q.codes
    return Quantized(codes, q.scale if fmt.is_plain else q.scale.clone().requires_grad_(), q.zero)


@EVERY_WINDOW
@pytest.mark.parametrize("fw", [FORMATS["int8"], FORMATS["int8_g128"]], ids=str)
@pytest.mark.parametrize("fx", [FORMATS["uint8_tensor"], FORMATS["float32"]], ids=str)
def test_every_float_argument_has_its_exact_derivative(window, fx, fw):
    x, w = sample(window, fx=fx, fw=fw)
    x, w = leaves(x, fx), leaves(w, fw)
    bias = torch.randn(window[1][0], requires_grad=True)
    floats = [t for t in (x.codes, x.scale, w.scale, bias) if t.requires_grad]
    y = call(x, w, bias, window, fx=fx, fw=fw)
    oracle = plain(value(x, fx), value(w, fw, weight=True), bias.double(), window)
    weights = torch.randn(y.shape)
    got = torch.autograd.grad((y * weights).sum(), floats)
    want = torch.autograd.grad((oracle * weights).sum(), floats)
    assert len(floats) == 3
    for ours, theirs in zip(got, want, strict=True):
        assert relative_rms(ours, theirs) <= 1e-6


@pytest.mark.parametrize(
    ("name", "fx", "fw"),
    [("strided", "uint8_tensor", "int8"), ("one dimension", "bfloat16", "int4_g32")],
)
def test_the_op_keeps_its_contract(name, fx, fw):
    window = WINDOWS[name]
    x, w = sample(window, fx=FORMATS[fx], fw=FORMATS[fw])
    x, w = leaves(x, FORMATS[fx]), leaves(w, FORMATS[fw])
    parts = (x.codes, x.scale, x.zero, w.codes, w.scale, w.zero)
    bias = torch.randn(window[1][0], requires_grad=True)
    torch.library.opcheck(conv, (*parts, bias, *window[2:], fx, fw, torch.float32))


@EVERY_WINDOW
def test_the_fake_predicts_shape_and_strides(window):
    fx, fw = FORMATS["uint8_tensor"], FORMATS["int8"]
    x, w = sample(window, fx=fx, fw=fw)
    real = call(x, w, None, window, fx=fx, fw=fw)
    meta = [Quantized(q.codes.to("meta"), q.scale.to("meta"), q.zero.to("meta")) for q in (x, w)]
    fake = call(*meta, None, window, fx=fx, fw=fw)
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


def test_an_input_with_more_than_one_scale_is_refused():
    window = WINDOWS["plain"]
    x, w = sample(window, fx=FORMATS["int8"], fw=FORMATS["int8"])
    with pytest.raises(UnsupportedError, match="one scale for its input, but int8 has more"):
        call(x, w, None, window, fx=FORMATS["int8"], fw=FORMATS["int8"])
