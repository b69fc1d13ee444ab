"""Codes survive being packed into words; a word and its bytes hold what the kernels read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from mpq_fx.kernels.triton_packing import (
    pack_bytes,
    pack_codes,
    pack_rows,
    unit_of,
    unpack_bytes,
    unpack_codes,
    unpack_rows,
)

rows, lengths = st.integers(0, 5), st.integers(0, 70)


def codes_of(rows: int, k: int, bits: int) -> torch.Tensor:
    half = 1 << bits - 1
    return torch.randint(-half, half, (rows, k), dtype=torch.int8)


@pytest.mark.parametrize("bits", [4, 8])
@given(rows=rows, k=lengths)
def test_rows_of_any_length_survive_packing(bits, rows, k):
    codes = codes_of(rows, k, bits)
    words = pack_codes(codes, bits)
    assert words.shape == (-(-k // unit_of(bits)), rows, 4)
    assert words.is_contiguous()
    assert torch.equal(unpack_codes(words, bits, k), codes)
    strided = codes_of(k, rows, bits).t()
    assert torch.equal(unpack_codes(pack_codes(strided, bits), bits, k), strided)


@given(rows=rows, k=lengths)
def test_rows_of_any_length_survive_packing_by_bytes(rows, k):
    codes = torch.randint(0, 16, (rows, k), dtype=torch.int8)
    assert torch.equal(unpack_bytes(pack_bytes(codes), k), codes)
    strided = torch.randint(0, 16, (k, rows), dtype=torch.int8).t()
    assert torch.equal(unpack_bytes(pack_bytes(strided), k), strided)


@given(rows=rows, k=lengths)
def test_rows_of_activations_survive_packing_each_by_itself(rows, k):
    codes = codes_of(rows, k, 4)
    stored = pack_rows(codes)
    assert stored.shape == (rows, -(-k // 32) * 16)
    assert torch.equal(unpack_rows(stored, k), codes)
    assert not unpack_rows(stored, stored.shape[-1] * 2)[:, k:].any()
    words = stored.flatten().view(torch.int32).view(rows, -(-k // 32), 4).transpose(0, 1)
    assert torch.equal(words, pack_bytes(codes & 15)), "the words of a weight, row by row"


@pytest.mark.parametrize("bits", [4, 8])
def test_every_pair_of_neighbors_survives_packing(bits):
    half = 1 << bits - 1
    code = torch.arange(-half, half, dtype=torch.int8)
    pairs = torch.cartesian_prod(code, code)
    words = pack_codes(pairs, bits)
    assert torch.equal(unpack_codes(words, bits, 2), pairs)


def test_places_of_a_word_are_four_neighbors_apart():
    codes = torch.arange(32, dtype=torch.int8).view(1, 32) % 16 - 8
    (unit,) = pack_codes(codes, 4)[:, 0].tolist()
    for word, bits in enumerate(unit):
        places = [bits >> 4 * place & 15 for place in range(8)]
        assert places == [(4 * place + word) % 16 for place in range(8)]


def test_bytes_of_a_word_are_neighbors():
    codes = torch.arange(32, dtype=torch.int8).view(1, 32) % 16
    (unit,) = pack_bytes(codes)[:, 0].tolist()
    for word, bits in enumerate(unit):
        low = [bits >> 8 * byte & 15 for byte in range(4)]
        high = [bits >> 8 * byte + 4 & 15 for byte in range(4)]
        assert low + high == [(8 * word + k) % 16 for k in range(8)]
