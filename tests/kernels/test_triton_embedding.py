"""mpq_triton::embedding against mpq::embedding: the same numbers, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

import mpq_fx.kernels  # noqa: F401 - registers the ops
from mpq_fx.formats import FORMATS, Format, Int
from mpq_fx.kernels.embedding import triton as kernel
from mpq_fx.numerics import Quantized, quantize
from tests.kernels.tolerance import (
    DEVICE,
    bump_one_code,
    next_group_scale,
    next_row_scale,
    swap_nibbles,
)

mpq, mpq_triton = torch.ops.mpq, torch.ops.mpq_triton
FMTS = [f for f in FORMATS.values() if not f.is_plain and not f.has_float_codes]
fmts = pytest.mark.parametrize("fmt", FMTS, ids=str)


def table(rows: int, length: int, fmt) -> Quantized:
    return quantize(torch.randn(rows, length) + 0.2, fmt)


def run(indices, w: Quantized, fmt, out=torch.float32) -> torch.Tensor:
    codes, scale, zero = (part.to(DEVICE) for part in (w.codes, w.scale, w.zero))
    packed = mpq_triton.embedding_pack(codes, fmt.name)
    zero = None if fmt.symmetric else zero
    length = w.codes.shape[1]
    args = (indices.to(DEVICE), packed, scale, zero, length, fmt.name, out)
    return mpq_triton.embedding(*args).cpu()


def reference(indices, w: Quantized, fmt, out=torch.float32) -> torch.Tensor:
    return mpq.embedding(indices, w.codes, w.scale, w.zero, fmt.name, out)


@fmts
@pytest.mark.parametrize("length", [1, 15, 17, 129, 600])
def test_equals_the_reference(length, fmt):
    w = table(9, length, fmt)
    for indices in (torch.randint(0, 9, (3, 5)), torch.randint(0, 9, (7,), dtype=torch.int32)):
        assert torch.equal(run(indices, w, fmt), reference(indices, w, fmt))


@settings(max_examples=20)
@given(
    rows=st.integers(1, 20),
    length=st.integers(0, 70),
    shape=st.lists(st.integers(0, 5), max_size=3),
    fmt=st.sampled_from(FMTS),
)
def test_any_shape(rows, length, shape, fmt):
    w, indices = table(rows, length, fmt), torch.randint(0, rows, shape)
    got = run(indices, w, fmt)
    assert got.shape == (*shape, length)
    assert torch.equal(got, reference(indices, w, fmt))


@pytest.mark.parametrize("out", [torch.float16, torch.bfloat16], ids=str)
def test_rounds_once_to_the_dtype_of_the_model(out):
    fmt, indices = FORMATS["int4_g32"], torch.arange(9)
    w = table(9, 100, fmt)
    got, exact = run(indices, w, fmt, out), reference(indices, w, fmt)
    assert got.dtype == out
    assert bool(((got.float() - exact).abs() <= exact.abs() * torch.finfo(out).eps).all())


@fmts
def test_any_strides(fmt):
    w = table(8, 40, fmt)
    loose = Quantized(
        w.codes.t().contiguous().t(),
        w.scale if w.scale.ndim == 0 else w.scale.t().contiguous().t(),
        w.zero if w.zero.ndim == 0 else w.zero.t().contiguous().t(),
    )
    indices = torch.randint(0, 8, (12, 6))
    for view in (indices.t(), indices[::2, 1::3], indices[:, :1].expand(12, 4)):
        assert torch.equal(run(view, loose, fmt), reference(view, w, fmt))


@pytest.mark.parametrize("last", [(slice(None), slice(-1, None)), (1, slice(0, None, 3))], ids=str)
def test_the_last_token_of_each_row_is_looked_up_where_it_lies(last):
    """Indices that flatten to a view, as those of a decoding step, are not contiguous."""
    fmt, ids = FORMATS["int8"], torch.arange(12, device=DEVICE).view(2, 6)
    w, view = table(12, 40, fmt), ids[last]
    assert not view.reshape(-1).is_contiguous()
    assert torch.equal(run(view, w, fmt), reference(view.cpu(), w, fmt))


BUGS = [
    (swap_nibbles, "int4_row"),
    (next_group_scale, "int4_g32"),
    (next_row_scale, "int8"),
    (bump_one_code, "int4_asym"),
    (bump_one_code, "int8"),
]


@pytest.mark.parametrize(("bug", "name"), BUGS, ids=lambda part: getattr(part, "__name__", part))
def test_a_broken_table_is_caught(bug, name):
    fmt, indices = FORMATS[name], torch.arange(6)
    w = table(6, 130, fmt)
    assert not torch.equal(run(indices, bug(w, fmt), fmt), reference(indices, w, fmt))


def test_offsets_have_64_bits():
    """A row begins 2^31 bytes behind the other; the memory between them is never touched."""
    fmt = FORMATS["int8"]
    w = table(2, 40, fmt)
    far = torch.empty_strided((2, 40), (1 << 31, 1), dtype=torch.int8, device=DEVICE)
    far.copy_(w.codes)
    args = (torch.tensor([1, 0], device=DEVICE), far, w.scale.to(DEVICE), None, 40, fmt)
    got = kernel.launch(*args, torch.float32)
    assert torch.equal(got.cpu(), reference(torch.tensor([1, 0]), w, fmt))


@pytest.mark.skipif(DEVICE == "cuda", reason="traps, after which the process has no GPU")
@pytest.mark.parametrize("bad", [-1, 9])
def test_an_index_out_of_range_is_refused(bad):
    fmt = FORMATS["int8"]
    with pytest.raises(IndexError, match=f"index {bad} is out of range .* of 9 rows"):
        run(torch.tensor([[0, bad]]), table(9, 16, fmt), fmt)


def test_refusals_say_why():
    assert not [*kernel.refuse(FORMATS["int4_g32"])]
    for name in ("bfloat16", "fp8_e4m3"):
        assert [*kernel.refuse(FORMATS[name])] == [f"{name} has no integer codes"]
    (groups,) = kernel.refuse(Format("g24", Int(4), torch.float16, 24))
    assert groups == "groups are multiples of 16 here, and those of g24 are 24"


@fmts
def test_the_ops_keep_their_contract(fmt):
    w = table(6, 41, fmt)
    codes, scale = w.codes.to(DEVICE), w.scale.to(DEVICE)
    zero = None if fmt.symmetric else w.zero.to(DEVICE)
    torch.library.opcheck(mpq_triton.embedding_pack, (codes, fmt.name))
    packed = mpq_triton.embedding_pack(codes, fmt.name)
    indices = torch.arange(6, device=DEVICE).view(2, 3)
    args = (indices, packed, scale, zero, 41, fmt.name, torch.float32)
    torch.library.opcheck(mpq_triton.embedding, args)
