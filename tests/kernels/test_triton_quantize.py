"""mpq_triton::quantize… against the reference ops: codes, scales and zero points equal by bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

import mpq_fx.kernels.quantize.triton as triton_quantize
import mpq_fx.kernels.quantize.triton_norm as triton_norm
from mpq_fx.formats import FORMATS, Format, Int
from mpq_fx.kernels.quantize.triton import LONGEST, is_packed
from mpq_fx.kernels.triton_packing import pack_rows, unpack_rows
from tests.kernels.tolerance import DEVICE, FAR, far_apart

mpq, mpq_triton = torch.ops.mpq, torch.ops.mpq_triton
PACKED = ["int4", "int4_g32", "int4_row", "int4_asym"]
DYNAMIC = ["int8", "int8_asym", "int8_g128", *PACKED]
STATIC = ["int8_tensor", "int8_tensor_asym", "uint8_tensor", "int7_tensor", "int4_tensor"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (15, 33), (17, 128), (129, 20), (2, 3, 300), (0, 8), (4, 0), (7,), ()]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def reference(op, x, *args):
    """The reference op on a CPU: on a GPU PyTorch divides by a number less exactly."""
    found = op(x.cpu(), *[a.cpu() if isinstance(a, torch.Tensor) else a for a in args])
    return tuple(t.to(DEVICE) for t in found) if isinstance(found, tuple) else found.to(DEVICE)


def codes_of(stored, fmt, k):
    """What a kernel stored as the reference has it, one in a byte; zeros fill a row up."""
    named = FORMATS[fmt]
    if not is_packed(named):
        return stored
    codes = unpack_rows(stored.cpu(), k)
    assert not named.symmetric or torch.equal(pack_rows(codes), stored.cpu())
    return codes.to(DEVICE)


def assert_same(got, want, fmt):
    got, want = (f if isinstance(f, tuple) else (f,) for f in (got, want))
    k = want[0].shape[-1] if want[0].ndim else 1
    codes = codes_of(got[0], fmt, k).view(want[0].shape)
    for one, other in zip((codes, *got[1:]), want, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert torch.equal(one, other)


def rows(*shape, dtype=torch.float32):
    """Numbers of very different size, a row of zeros, and rows whose values are ties."""
    x = torch.randn(shape) * torch.logspace(-3, 3, shape[-1] if shape else 1)
    if len(shape) > 1 and shape[-2] > 2 and shape[-1] > 1:
        x[..., 0, :] = 0
        x[..., 1, :] = torch.randint(-127, 127, shape[-1:]) + 0.5
        x[..., 1, 0] = 127  # makes the scale 1, and so every other value a tie
    return x.to(dtype).to(DEVICE)


@shapes
@pytest.mark.parametrize("fmt", DYNAMIC)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dynamic_codes_scales_and_zeros_are_those_of_the_reference(shape, fmt, dtype):
    x = rows(*shape, dtype=dtype)
    assert_same(mpq_triton.quantize_dynamic(x, fmt), reference(mpq.quantize_dynamic, x, fmt), fmt)


@shapes
@pytest.mark.parametrize("fmt", STATIC)
def test_static_codes_are_those_of_the_reference(shape, fmt):
    x = rows(*shape)
    zero = 0 if FORMATS[fmt].symmetric else FORMATS[fmt].qmin + 101
    for scale in (0.5, 0.013, 1e-30):  # ties, ordinary numbers, and all saturated
        args = (torch.tensor(scale), torch.tensor(zero, dtype=torch.int32))
        args = tuple(t.to(DEVICE) for t in args)
        got = mpq_triton.quantize(x, *args, fmt)
        assert_same(got, reference(mpq.quantize, x, *args, fmt), fmt)


@pytest.mark.parametrize("fmt", DYNAMIC)
def test_a_row_too_long_for_registers_is_read_twice(fmt):
    x = rows(3, LONGEST + 77)
    x[2, -1] = 1e6  # the range is that of the whole row
    assert_same(mpq_triton.quantize_dynamic(x, fmt), reference(mpq.quantize_dynamic, x, fmt), fmt)


@given(
    st.integers(0, 40),
    st.integers(1, 200),
    st.sampled_from(["as is", "turned", "every other", "of a slice", "repeated"]),
    st.sampled_from(DYNAMIC),
)
@settings(max_examples=25)
def test_any_strides(m, k, layout, fmt):
    x = {
        "as is": lambda: rows(m, k),
        "turned": lambda: rows(k, m).t(),
        "every other": lambda: rows(2 * m, 2 * k)[::2, ::2],
        "of a slice": lambda: rows(3, m + 1, k + 5).transpose(0, 1)[1:, :, 5:],
        "repeated": lambda: rows(1, k).expand(m, k),
    }[layout]()
    assert_same(mpq_triton.quantize_dynamic(x, fmt), reference(mpq.quantize_dynamic, x, fmt), fmt)
    scale, zero = torch.tensor(0.3, device=DEVICE), torch.tensor(0, device=DEVICE).int()
    for name in ("int8_tensor", "int4_tensor"):
        want = reference(mpq.quantize, x, scale, zero, name)
        assert_same(mpq_triton.quantize(x, scale, zero, name), want, name)


def differing(got, want) -> float:
    """Share of the codes that differ; of neighbors, for rounding may move a value over a tie."""
    got, want = got.int(), want.int()
    assert int((got - want).abs().max()) <= 1
    return (got != want).float().mean().item()


def silu_times(x, up):
    return torch.nn.functional.silu(x) * up


def gelu_tanh(x):
    return torch.nn.functional.gelu(x, approximate="tanh")


def product(x, up):
    return x * up


PRODUCERS = {
    "silu": silu_times,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": gelu_tanh,
    "none": product,
}


@pytest.mark.parametrize("activation", PRODUCERS)
@pytest.mark.parametrize("fmt", DYNAMIC)
@pytest.mark.parametrize("shape", [(15, 33), (2, 9, 130), (0, 4)], ids=str)
def test_an_activation_in_front_gives_the_codes_of_its_result(activation, fmt, shape):
    x = torch.randn(shape, device=DEVICE) * 3
    up = torch.randn(shape, device=DEVICE) if activation in ("silu", "none") else None
    y = PRODUCERS[activation](*(t for t in (x, up) if t is not None))
    got = mpq_triton.activation_quantize_dynamic(x, up, activation, fmt)
    want = reference(mpq.quantize_dynamic, y, fmt)
    step = 1e-6 if got[1].dtype == torch.float32 else 2**-10  # the next number, at most
    torch.testing.assert_close(got[1], want[1], rtol=step, atol=0)
    if x.numel():
        assert differing(codes_of(got[0], fmt, shape[-1]), want[0]) <= 0.01
        scale, zero = torch.tensor(0.05, device=DEVICE), torch.tensor(3, device=DEVICE).int()
        static = mpq_triton.activation_quantize(x, up, scale, zero, activation, "uint8_tensor")
        assert differing(static, reference(mpq.quantize, y, scale, zero, "uint8_tensor")) <= 0.01


def norms(x, weight, bias):
    """(is centered, bias, the norm in float64)"""
    wide, shape = x.double(), x.shape[-1:]
    yield (
        True,
        bias,
        torch.nn.functional.layer_norm(wide, shape, weight.double(), bias.double(), 1e-5),
    )
    yield False, None, torch.nn.functional.rms_norm(wide, shape, weight.double(), 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", ["int8", "int8_asym", "int4_row"])
@pytest.mark.parametrize("shape", [(15, 33), (2, 9, 130), (1, 4096), (5, 1)], ids=str)
def test_a_norm_in_front_gives_the_codes_of_its_result(shape, fmt, dtype):
    x = (torch.randn(shape, device=DEVICE) * 2 + 1).to(dtype)
    weight, bias = (torch.randn(shape[-1], device=DEVICE).to(dtype) for _ in range(2))
    for is_centered, shift, y in norms(x, weight, bias):
        y = y.to(dtype)
        got = mpq_triton.norm_quantize_dynamic(x, weight, shift, 1e-5, is_centered, fmt)
        want = reference(mpq.quantize_dynamic, y, fmt)
        few = 0.01 if dtype == torch.float32 else 0.05  # a rounding to 16 bits moves values, too
        assert differing(codes_of(got[0], fmt, shape[-1]), want[0]) <= few
        step = 2 * max(torch.finfo(dtype).eps, torch.finfo(got[1].dtype).eps)
        torch.testing.assert_close(got[1], want[1], rtol=step, atol=0)
        scale, zero = torch.tensor(0.03, device=DEVICE), torch.tensor(0, device=DEVICE).int()
        args = (scale, zero, 1e-5, is_centered, "int8_tensor")
        static = mpq_triton.norm_quantize(x, weight, shift, *args)
        assert differing(static, reference(mpq.quantize, y, scale, zero, "int8_tensor")) <= few


@pytest.mark.parametrize("strides", FAR.values(), ids=FAR)
def test_offsets_have_64_bits(strides):
    x = rows(2, 128)
    far, scale, zero = far_apart(x, strides), x.abs().max() / 127, torch.tensor(0).to(x.device)
    for op, args in (
        (mpq_triton.quantize, (scale, zero, "int8_tensor")),
        (mpq_triton.quantize_dynamic, ("int8",)),
        (mpq_triton.quantize_dynamic, ("int4_g32",)),
        (mpq_triton.norm_quantize_dynamic, (None, None, 1e-5, True, "int8")),
    ):
        got, want = ((f if isinstance(f, tuple) else (f,)) for f in (op(far, *args), op(x, *args)))
        assert all(map(torch.equal, got, want))


def test_a_norm_without_weights_of_a_turned_matrix():
    x = torch.randn(33, 15, device=DEVICE).t()
    y = torch.nn.functional.layer_norm(x.double(), (33,)).float()
    codes, _, _ = mpq_triton.norm_quantize_dynamic(x, None, None, 1e-5, True, "int8")
    assert differing(codes, reference(mpq.quantize_dynamic, y, "int8")[0]) <= 0.01


@pytest.mark.parametrize(
    ("refuse", "fmt", "reason"),
    [
        (triton_quantize.refuse_static, "int8", "more than one scale per tensor"),
        (triton_quantize.refuse_static, "bfloat16", "no codes of a byte or of 4 bits"),
        (triton_quantize.refuse_dynamic, "int8_tensor", "a kernel of one pass cannot know"),
        (
            triton_quantize.refuse_dynamic,
            Format("g16", Int(8), torch.bfloat16, 16),
            "stored in torch.bfloat16",
        ),
        (triton_quantize.refuse_dynamic, Format("g48", Int(4), torch.float16, 48), "g48 are 48"),
    ],
    ids=lambda part: getattr(part, "__name__", str(part)),
)
def test_formats_that_the_kernels_do_not_write_are_refused(refuse, fmt, reason):
    (said, *_) = refuse(FORMATS.get(fmt, fmt))
    assert reason in said


def test_norms_refuse_rows_that_do_not_stay_in_registers():
    (said,) = triton_norm.refuse(FORMATS["int8"], LONGEST + 1, is_static=False)
    assert f"{LONGEST + 1} values" in said
    assert not list(triton_norm.refuse(FORMATS["int8"], LONGEST, is_static=False))
    (said,) = triton_norm.refuse(FORMATS["int8_g128"], 256, is_static=False)
    assert "scales of groups" in said


@pytest.mark.parametrize("size", [1e-38, 3e-7, 5e-5, 0.1, 6e4, 4e5, 1e30])
def test_scales_of_sixteen_bits_are_the_next_larger_ones_of_any_size(size):
    """Subnormal ones too, and the largest, above which codes saturate."""
    x = torch.rand(64, 33, device=DEVICE) * size
    want = reference(mpq.quantize_dynamic, x, "int4_row")
    assert_same(mpq_triton.quantize_dynamic(x, "int4_row"), want, "int4_row")


def test_a_code_in_another_half_or_row_is_seen():
    """What these tests compare by bites."""
    x = rows(17, 128)
    want = reference(mpq.quantize_dynamic, x, "int4_row")
    codes, *rest = mpq_triton.quantize_dynamic(x, "int4_row")
    for broken in (codes << 4 | codes >> 4, codes.roll(1, 0), codes.roll(1, 1)):
        with pytest.raises(AssertionError):
            assert_same((broken, *rest), want, "int4_row")


def test_the_ops_keep_their_contracts():
    x, up = torch.randn(5, 40, device=DEVICE), torch.randn(5, 40, device=DEVICE)
    scale, zero = torch.tensor(0.1, device=DEVICE), torch.tensor(0, device=DEVICE).int()
    checks = ("test_schema", "test_faketensor")
    for op, args in (
        (mpq_triton.quantize, (x, scale, zero, "int8_tensor")),
        (mpq_triton.quantize, (x, scale, zero, "int4_tensor")),
        (mpq_triton.quantize_dynamic, (x, "int8")),
        (mpq_triton.quantize_dynamic, (x, "int4_g32")),
        (mpq_triton.activation_quantize, (x, up, scale, zero, "silu", "int8_tensor")),
        (mpq_triton.activation_quantize_dynamic, (x, None, "gelu", "int8_g128")),
        (mpq_triton.norm_quantize, (x, None, None, scale, zero, 1e-5, True, "int8_tensor")),
        (mpq_triton.norm_quantize_dynamic, (x, up[0], None, 1e-5, False, "int8")),
    ):
        torch.library.opcheck(op.default, args, test_utils=checks)
