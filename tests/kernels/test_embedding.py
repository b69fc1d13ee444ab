"""mpq::embedding: rows of the dequantized table, bit for bit."""

from __future__ import annotations

import pytest
import torch

import mpq_fx.kernels  # noqa: F401 - registers the ops
from mpq_fx.formats import FORMATS, Format
from mpq_fx.numerics import Quantized, dequantize, quantize, relative_rms, spread

embedding = torch.ops.mpq.embedding
EVERY = pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
INDICES = {
    "batch": torch.tensor([[1, 2, 1], [6, 0, 3]]),
    "int32": torch.tensor([5, 5, 2], dtype=torch.int32),
    "scalar": torch.tensor(4),
    "none": torch.empty(2, 0, dtype=torch.long),
    "strided": torch.tensor([[1, 2], [3, 4], [5, 6]]).t(),
}


def call(indices: torch.Tensor, q: Quantized, fmt: Format, out=torch.float32) -> torch.Tensor:
    return embedding(indices, q.codes, q.scale, q.zero, fmt.name, out)


@EVERY
@pytest.mark.parametrize("indices", INDICES.values(), ids=INDICES.keys())
def test_looks_up_rows_of_the_dequantized_table(fmt, indices):
    q = quantize(torch.randn(7, 140) + 0.2, fmt)
    table = dequantize(q, fmt)
    assert torch.equal(call(indices, q, fmt), table[indices.long()])
    assert torch.equal(call(indices, q, fmt, torch.bfloat16), table[indices.long()].bfloat16())


def test_a_table_of_any_strides():
    fmt = FORMATS["int8_g128"]
    q = quantize(torch.randn(140, 7).t(), fmt)
    assert not q.codes.is_contiguous()
    picked = INDICES["batch"]
    assert torch.equal(call(picked, q, fmt), dequantize(q, fmt)[picked])


@pytest.mark.parametrize("bad", [-1, 7])
def test_an_index_out_of_range_is_refused(bad):
    q = quantize(torch.randn(7, 8), FORMATS["int8"])
    with pytest.raises((IndexError, RuntimeError), match="out of range"):
        call(torch.tensor([bad]), q, FORMATS["int8"])


@EVERY
def test_every_float_argument_has_its_exact_derivative(fmt):
    q = quantize(torch.randn(7, 140) + 0.2, fmt)
    picked = INDICES["batch"]  # row 1 twice
    exact = Quantized(q.codes.double(), q.scale.double(), q.zero)
    leaf, oracle_leaf = (
        (part.codes if fmt.is_plain else part.scale).requires_grad_() for part in (q, exact)
    )
    oracle = exact.codes[picked]
    if not fmt.is_plain:
        steps = exact.codes - spread(q.zero, fmt, 140)
        oracle = (steps * spread(exact.scale, fmt, 140))[picked]
    y = call(picked, q, fmt)
    weights = torch.randn(y.shape)
    (got,) = torch.autograd.grad((y * weights).sum(), leaf)
    (want,) = torch.autograd.grad((oracle * weights).sum(), oracle_leaf)
    assert got.dtype == leaf.dtype
    assert relative_rms(got, want) <= {torch.float32: 1e-6}.get(leaf.dtype, 2**-8)


@pytest.mark.parametrize("name", ["int8", "int4_g32", "int8_tensor", "fp8_e4m3", "bfloat16"])
def test_the_op_keeps_its_contract(name):
    fmt = FORMATS[name]
    q = quantize(torch.randn(7, 40), fmt)
    (q.codes if fmt.is_plain else q.scale).requires_grad_()
    arguments = (INDICES["batch"], q.codes, q.scale, q.zero, name, torch.float32)
    if fmt.has_float_codes:  # the two others compare by arithmetic that torch does not have for it
        checks = ("test_autograd_registration", "test_faketensor")
        torch.library.opcheck(embedding, arguments, test_utils=checks)
    else:
        torch.library.opcheck(embedding, arguments)
