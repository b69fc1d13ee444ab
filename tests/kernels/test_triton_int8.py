"""mpq_triton::int8_linear against mpq::linear on the same codes, and proof that the limit bites."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

import mpq_fx.kernels  # noqa: F401 - registers the ops
from mpq_fx.errors import ConfigError
from mpq_fx.formats import FORMATS
from mpq_fx.kernels import tile as tiles
from mpq_fx.kernels.linear import triton_int8, triton_linear
from mpq_fx.kernels.linear.triton_epilogue import Epilogue
from mpq_fx.kernels.linear.triton_int8 import INT8, TILES
from mpq_fx.kernels.linear.triton_linear import Call, Shape, call_of
from mpq_fx.kernels.tile import Tile
from mpq_fx.numerics import Quantized, quantize, relative_rms
from mpq_fx.passes.lower.triton_device import DEVICES
from tests.kernels.tolerance import (
    DEVICE,
    FAR,
    bump_one_code,
    drop_last_block,
    far_apart,
    limit,
    next_row_scale,
)

mpq, mpq_triton = torch.ops.mpq, torch.ops.mpq_triton
W = FORMATS["int8"]
X_FORMATS = [
    FORMATS[n] for n in ("int8", "int8_asym", "int8_tensor", "uint8_tensor", "int7_tensor")
]
SMALL = Tile(16, 16, 32, 2, 4, 1)  # many tiles, and tails, of small operands
x_formats = pytest.mark.parametrize("fmt", X_FORMATS, ids=str)


def on_device(q: Quantized) -> Quantized:
    return Quantized(q.codes.to(DEVICE), q.scale.to(DEVICE), q.zero.to(DEVICE))


def sample(m: int, n: int, k: int, fmt) -> tuple[Quantized, Quantized]:
    x = quantize(torch.randn(m, k) + 0.3, fmt)
    return on_device(x), on_device(quantize(torch.randn(n, k) * torch.logspace(-1, 1, k), W))


def reference(x: Quantized, w: Quantized, bias, fmt, out=torch.float32):
    parts = (x.codes, x.scale, x.zero, w.codes, w.scale, w.zero, bias)
    return mpq.linear(*parts, fmt.name, W.name, out)


def arguments(x: Quantized, w: Quantized, fmt, *, bias=None, dtype=torch.float32, **after):
    """Those of the op, in the order of its schema."""
    packed = mpq_triton.int8_linear_pack(w.codes, w.scale, w.zero, W.name)
    given = [
        after.get(name)
        for name in ("addend", "addend_scale", "addend_zero", "out_scale", "out_zero")
    ]
    zero = None if fmt.symmetric else x.zero
    named = (fmt.name, W.name, w.codes.shape[0], after.get("activation", "none"))
    return (x.codes, x.scale, zero, packed, bias, *given, *named, dtype, after.get("out_fmt", ""))


def run(x, w, fmt, *, tile=None, **after):
    """Through the op, or in a given tile straight into the launch."""
    args = arguments(x, w, fmt, **after)
    if tile is None:
        return mpq_triton.int8_linear(*args)
    return INT8.launch(replace(call_of(*args), tile=tile))


def unit(codes: torch.Tensor, zero: int = 0) -> Quantized:
    scale, zeros = torch.tensor(1.0), torch.tensor(zero, dtype=torch.int32)
    return on_device(Quantized(codes, scale, zeros))


@x_formats
@pytest.mark.parametrize("m", [1, 15, 17, 129])
@pytest.mark.parametrize(("n", "k"), [(7, 33), (64, 64), (50, 300)])
def test_sums_are_exact(m, n, k, fmt):
    codes = torch.randint(fmt.qmin, fmt.qmax + 1, (m, k), dtype=fmt.dtype)
    w = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    ones, row_zero = torch.ones(n, 1), torch.full((m, 1), 5, dtype=torch.int32)
    x, zero = unit(codes, 0 if fmt.symmetric else 17), 0 if fmt.symmetric else 17
    if fmt.block == 0:
        zero = 0 if fmt.symmetric else 5
        x = on_device(Quantized(codes, torch.ones(m, 1), row_zero * (zero != 0)))
    weight = on_device(Quantized(w, ones, torch.zeros(n, 1, dtype=torch.int32)))
    want = (codes.long() - zero) @ w.long().T
    assert int(want.abs().max()) < 2**24, "float32 holds every sum"
    got = run(x, weight, fmt)
    assert torch.equal(got.cpu(), want.float())


@pytest.mark.parametrize(("fmt", "codes", "zero"), [("uint8_tensor", 255, 0), ("int8", -127, 0)])
def test_the_largest_sums_do_not_overflow(fmt, codes, zero):
    fmt, k = FORMATS[fmt], 4096
    x = torch.full((2, k), codes, dtype=fmt.dtype)
    scale, zeros = torch.ones(2, 1), torch.full((2, 1), zero, dtype=torch.int32)
    x = unit(x, zero) if fmt.block else on_device(Quantized(x, scale, zeros))
    w = unit(torch.full((3, k), 127, dtype=torch.int8))
    assert run(x, w, fmt).unique().tolist() == [float((codes - zero) * 127 * k)]


@x_formats
@pytest.mark.parametrize("shape", [(15, 50, 300), (17, 16, 64), (1, 129, 40)], ids=str)
def test_equals_the_reference(shape, fmt):
    m, n, k = shape
    x, w = sample(m, n, k, fmt)
    bias = torch.randn(n, device=DEVICE)
    for tile in (None, SMALL):
        got = run(x, w, fmt, bias=bias, tile=tile)
        assert relative_rms(got, reference(x, w, bias, fmt)) <= limit(k)
    for out in (torch.bfloat16, torch.float16):
        got = run(x, w, fmt, bias=bias, dtype=out)
        assert got.dtype == out
        assert relative_rms(got, reference(x, w, bias, fmt, out)) <= limit(k, out)


@pytest.mark.parametrize("bug", [bump_one_code, drop_last_block, next_row_scale])
@x_formats
def test_a_broken_weight_or_activation_is_caught(bug, fmt):
    x, w = sample(20, 24, 100, fmt)
    want = reference(x, w, None, fmt)
    broken = run(x, on_device(bug(w, W)), fmt, tile=SMALL)
    assert relative_rms(broken, want) > limit(100)
    if bug is not next_row_scale or fmt.block == 0:
        broken = run(on_device(bug(x, fmt)), w, fmt, tile=SMALL)
        assert relative_rms(broken, want) > limit(100)


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 100),
    st.sampled_from(["as is", "turned", "every other"]),
    st.sampled_from(X_FORMATS),
)
@settings(max_examples=20)
def test_any_size_and_strides_in_small_tiles(m, n, k, layout, fmt):
    x, w = sample(m, n, k, fmt)
    codes = {
        "as is": lambda: x.codes,
        "turned": lambda: x.codes.t().contiguous().t(),
        "every other": lambda: x.codes.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2],
    }[layout]()
    got = run(Quantized(codes, x.scale, x.zero), w, fmt, tile=SMALL)
    assert relative_rms(got, reference(x, w, None, fmt)) <= limit(k)


@pytest.mark.parametrize("strides", FAR.values(), ids=FAR)
def test_offsets_have_64_bits(strides):
    x, w = sample(2, 5, 128, W)
    far, tile = replace(x, codes=far_apart(x.codes, strides)), replace(SMALL, block_k=64)
    assert torch.equal(run(far, w, W, tile=tile), run(x, w, W, tile=tile))


@pytest.mark.parametrize("strides", FAR.values(), ids=FAR)
def test_an_addend_may_lie_anywhere(strides):
    x, w = sample(2, 128, 32, W)
    addend = torch.randn(2, 128)
    got = run(x, w, W, tile=Tile(16, 128, 32, 1), addend=far_apart(addend, strides))
    assert torch.equal(got, run(x, w, W, addend=addend.to(DEVICE)))


@pytest.mark.parametrize("shape", [(0, 40), (2, 0, 40), (40,), (2, 3, 40)], ids=str)
def test_any_leading_shape_and_no_rows_at_all(shape):
    x = on_device(quantize(torch.randn(shape), W))
    w = on_device(quantize(torch.randn(6, 40), W))
    got = run(x, w, W)
    assert got.shape == (*shape[:-1], 6)
    torch.testing.assert_close(got, reference(x, w, None, W))


ACTIVATIONS = {
    "none": lambda y: y,
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda y: torch.nn.functional.gelu(y, approximate="tanh"),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("addend", ["none", "floats", "turned", "bfloat16", "codes"])
@pytest.mark.parametrize("out", ["floats", "uint8_tensor", "int8_tensor"])
def test_what_follows_in_the_kernel_is_what_would_follow_behind_it(activation, addend, out):
    m, n, k, fmt = 18, 20, 40, FORMATS["uint8_tensor"]
    x, w = sample(m, n, k, fmt)
    bias, after = torch.randn(n, device=DEVICE), {"activation": activation}
    want = reference(x, w, bias, fmt)
    added = torch.randn(m, n, device=DEVICE)
    if addend == "codes":
        kept = on_device(quantize(added, fmt))
        added = (kept.codes.float() - kept.zero) * kept.scale
        after |= {"addend": kept.codes, "addend_scale": kept.scale, "addend_zero": kept.zero}
    elif addend != "none":
        added = added.bfloat16() if addend == "bfloat16" else added
        after["addend"] = added.t().contiguous().t() if addend == "turned" else added
    want = ACTIVATIONS[activation](want if addend == "none" else want + added)
    if out == "floats":
        got = run(x, w, fmt, bias=bias, tile=SMALL, **after)
        assert relative_rms(got, want) <= 4 * limit(k), "an activation rounds a few times more"
        return
    scale, zero = torch.tensor(0.1, device=DEVICE), torch.tensor(9, device=DEVICE).int()
    after |= {"out_scale": scale, "out_zero": zero, "out_fmt": out}
    got = run(x, w, fmt, bias=bias, tile=SMALL, **after)
    codes = mpq.quantize(want, scale, zero, out)
    apart = (got.int() - codes.int()).abs()
    assert got.dtype == codes.dtype
    assert int(apart.max()) <= 1, "rounding moves a value over a tie at most"
    assert (apart > 0).float().mean() <= 0.01
    assert got.unique().numel() > 5, "the codes are not all saturated"


def test_a_turned_bias_and_a_residual_of_more_dimensions():
    x = on_device(quantize(torch.randn(2, 3, 40), W))
    w = on_device(quantize(torch.randn(6, 40), W))
    x = Quantized(
        x.codes, x.scale.expand(2, 3, 2)[..., 1:].clone().repeat(1, 1, 3)[..., :1], x.zero
    )
    bias = torch.randn(6, 2, device=DEVICE)[:, 0]
    addend = torch.randn(3, 2, 6, device=DEVICE).transpose(0, 1)
    got = run(x, w, W, bias=bias, addend=addend)
    torch.testing.assert_close(got, reference(x, w, bias, W) + addend)


def shape_of(x: str = "int8", w: str = "int8", k: int = 64) -> Shape:
    return Shape(FORMATS[x], FORMATS[w], 8, 32, k, DEVICES["h100"].machine, "dynamic")


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (shape_of(w="int4"), "weights are int8"),
        (shape_of(w="int8_asym"), "no zero point here, not int8_asym"),
        (shape_of(w="int8_g128"), "a scale per row"),
        (shape_of(x="bfloat16"), "activations are codes of 8 bits"),
        (shape_of(x="int8_g128"), "a scale per row or tensor"),
        (shape_of(x="int4_row"), "activations are codes of 8 bits"),
        (shape_of(x="uint8_tensor", k=70_000), "int32 sums of 70000 products"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(shape, reason):
    (said,) = INT8.refuse(shape)
    assert reason in said


def test_it_refuses_nothing_that_it_can_do():
    for fmt in X_FORMATS:
        assert not list(INT8.refuse(shape_of(x=fmt.name, k=66_000)))


@given(
    st.sampled_from(list(DEVICES.values())),
    st.integers(1, 8192),
    st.integers(1, 16384),
    st.integers(1, 16384),
    st.booleans(),
)
def test_a_tile_fits_every_device_and_spills_nothing(device, m, n, k, is_plain):
    found = triton_int8.tile(m, n, k, device.machine, is_plain=is_plain)
    candidates = triton_int8.configurations(m, n, k, device.machine)
    for tile in (found, *candidates):
        assert tile.shared_bytes(1, 1) <= device.machine.shared
        assert tile.values <= 128, "more of them spill"
    assert is_plain or found.values <= tiles.ROOMY
    assert len(candidates) == len(set(candidates)) <= 40
    assert found.block_m <= max(16, 2 * m) or m > 256, "few rows do not fill a tall tile"


def test_a_small_matmul_is_cut_finely_and_a_large_one_coarsely():
    h100 = DEVICES["h100"].machine
    few = triton_int8.tile(1, 4096, 4096, h100, is_plain=True)
    assert few.count(1, 4096) >= h100.processors
    assert triton_int8.tile(4096, 4096, 4096, h100, is_plain=True) == TILES[0][0]


def test_a_tuned_tile_is_taken_for_its_shape_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(triton_linear, "TUNED", tmp_path / "tuned.json")
    int8 = FORMATS["int8"]

    def call(m, n, k, fmt=int8, **after) -> Call:
        x, codes = torch.ones(m, k, device=DEVICE), torch.ones(n, k, device=DEVICE)
        epilogue = Epilogue(torch.float32, **after)
        return Call(x, None, None, (codes,), int8, fmt, n, epilogue)

    def tile(*sizes, **given) -> Tile | None:
        return triton_linear.in_tuned_tile(INT8, call(*sizes, **given)).tile

    mine, wide = Tile(64, 64, 64, 4, 8, 5), Tile(128, 256, 128, 8, 8, 3)
    triton_linear.keep_tile(INT8, call(100, 64, 64), mine)
    triton_linear.keep_tile(INT8, call(100, 128, 64), wide)
    assert tile(128, 64, 64) == mine, "rows up to a power of two share a tile"
    assert tile(129, 64, 64) is tile(100, 64, 128) is tile(100, 64, 64, fmt=FORMATS["int4"]) is None
    assert tile(100, 128, 64) == wide
    assert tile(100, 128, 64, activation="gelu") is None, "it leaves no registers for that"
    assert tile(100, 64, 64, activation="gelu") == mine


@pytest.mark.parametrize(
    "wrong",
    [{"block": 1}, {"block_n": 0}, {"block_k": 96}, {"warps": "4"}, {"warps": 3}, {"stages": 2.0}],
    ids=str,
)
def test_a_file_of_wrong_tiles_is_refused_with_the_reason(tmp_path, monkeypatch, wrong):
    path = tmp_path / "tuned.json"
    monkeypatch.setattr(triton_linear, "TUNED", path)
    tile = {"block_m": 16, "block_n": 16, "block_k": 32, **wrong}
    path.write_text(json.dumps({"int8_linear int8": {"interpreter 1 1 1": tile}}))
    x = torch.ones(1, 1, device=DEVICE)
    call = Call(x, None, None, (x,), FORMATS["int8"], FORMATS["int8"], 1, Epilogue(torch.float32))
    with pytest.raises(ConfigError, match=f"holds no tiles: .*{next(iter(wrong))}"):
        triton_linear.in_tuned_tile(INT8, call)


def test_a_call_runs_in_its_tuned_tile(tmp_path, monkeypatch):
    monkeypatch.setattr(triton_linear, "TUNED", tmp_path / "tuned.json")
    seen, launch = [], INT8.launch
    x, w = sample(4, 5, 70, FORMATS["int8"])
    args = arguments(x, w, FORMATS["int8"])
    want = mpq_triton.int8_linear(*args)
    codes, *rest = args[0].reshape(4, 70), *args[1:]
    call = triton_linear.call_of(codes, *rest)
    triton_linear.keep_tile(INT8, call, SMALL)
    kernel = replace(INT8, launch=lambda call: seen.append(call.tile) or launch(call))
    got = kernel.launch(triton_linear.in_tuned_tile(kernel, call))
    assert seen == [SMALL]
    assert torch.equal(got, want)


def test_the_op_keeps_its_contract():
    x, w = sample(4, 5, 70, FORMATS["int8_asym"])
    args = arguments(x, w, FORMATS["int8_asym"], addend=torch.randn(4, 5, device=DEVICE))
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(mpq_triton.int8_linear.default, args, test_utils=checks)
    pack = (w.codes, w.scale, w.zero, "int8")
    torch.library.opcheck(mpq_triton.int8_linear_pack.default, pack, test_utils=checks)


def test_packed_weights_are_new_memory_so_that_they_can_be_refreshed():
    _, w = sample(4, 5, 70, W)
    packed = mpq_triton.int8_linear_pack(w.codes, w.scale, w.zero, "int8")
    own = {t.untyped_storage().data_ptr() for t in packed}
    assert own.isdisjoint(t.untyped_storage().data_ptr() for t in (w.codes, w.scale, w.zero))
    assert len(own) == len(packed)
    assert torch.equal(packed[2], w.codes.sum(1).int())


def test_an_epilogue_without_anything_is_plain():
    plain = Epilogue(torch.float32, bias=torch.zeros(3))
    assert plain.is_plain
    assert not replace(plain, activation="relu").is_plain
    assert isinstance(call_of(*arguments(*sample(4, 5, 70, W), W)), Call)
