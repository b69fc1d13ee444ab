"""Has a weight changed?  Every way of editing one, and how many calls until it is seen."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpq_fx.watch import BLOCK, CALLS, Watch, checksums


def weights(count: int = 3) -> list[torch.Tensor]:
    return [torch.randn(40, 50) for _ in range(count)]


def calls_until_seen(watch: Watch, tensors: list[torch.Tensor], limit: int) -> int | None:
    return next((k + 1 for k in range(limit) if watch.changed(tensors)), None)


EDITS = {
    "in place": lambda t: t.mul_(2),
    "one element": lambda t: t[3].fill_(7.0),
    "copy": lambda t: t.copy_(torch.ones_like(t)),
    "set data": lambda t: setattr(t, "data", t.data.clone()),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_what_pytorch_counts_or_moves_is_seen_on_the_next_call(edit):
    tensors = weights()
    watch = Watch(tensors)
    assert not any(watch.changed(tensors) for _ in range(CALLS))
    with torch.no_grad():
        edit(tensors[1])
    assert watch.changed(tensors) == [1]
    watch.accept(watch.seen(tensors, [1]))
    assert not any(watch.changed(tensors) for _ in range(CALLS))


def test_another_tensor_in_the_same_place_is_seen():
    tensors = weights()
    watch = Watch(tensors)
    kept, tensors[2] = tensors[2], torch.randn(40, 50)
    assert watch.changed(tensors) == [2]
    assert kept is not tensors[2]


@pytest.mark.parametrize("count", [1, 3, 70])
def test_a_dense_data_edit_is_seen_within_the_stated_number_of_calls(count):
    tensors = weights(count)
    watch = Watch(tensors)
    for victim in range(0, count, 7):
        tensors[victim].data.add_(1.0)
        calls = calls_until_seen(watch, tensors, CALLS)
        assert calls is not None
        watch.accept(watch.seen(tensors, [victim]))


def test_a_data_edit_of_one_block_is_seen_once_every_block_had_its_turn():
    tensors = [torch.zeros(5 * BLOCK + 3, dtype=torch.int8)]
    watch = Watch(tensors)
    tensors[0].data[-1] += 1
    assert calls_until_seen(watch, tensors, 6) is not None


@given(st.integers(0, 1999), st.sampled_from([torch.float32, torch.bfloat16, torch.int8]))
def test_every_single_element_counts_when_all_are_looked_at(at, dtype):
    tensors = [torch.zeros(2000, dtype=dtype), torch.zeros(3)]
    watch = Watch(tensors)
    tensors[0].data[at] = 1
    assert watch.edited(tensors) == [0]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(4, 6).t(),
        torch.randn(8, 8)[::2, ::2],
        torch.randn(3, dtype=torch.complex64),
        torch.tensor([True, False]),
        torch.randn(5).double(),
        torch.empty(0, 4),
        torch.tensor(1.0),
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    ],
    ids=["transposed", "strided", "complex", "bool", "double", "empty", "scalar", "channels last"],
)
def test_every_kind_of_tensor_can_be_watched(tensor):
    watch = Watch([tensor])
    assert not any(watch.changed([tensor]) for _ in range(3))
    if tensor.numel():
        tensor.data.copy_(
            tensor.data.clone().logical_not() if tensor.dtype == torch.bool else tensor.data + 1
        )
        assert watch.edited([tensor]) == [0]
        assert calls_until_seen(watch, [tensor], CALLS) is not None


def test_inference_tensors_have_no_counter_and_are_watched_by_contents():
    with torch.inference_mode():
        frozen = torch.randn(10)
    tensors = [torch.randn(10), frozen]
    watch = Watch(tensors)
    with torch.inference_mode():
        frozen.mul_(3)
    assert calls_until_seen(watch, tensors, CALLS) is not None
    assert watch.edited(tensors) == [1]


def test_a_sign_or_another_order_of_the_same_values_counts():
    x = torch.randn(BLOCK // 2)  # two blocks of float32
    known = checksums(x)
    assert len(known) == 2
    for other in (-x, x.roll(BLOCK // 4), x.flip(0).roll(BLOCK // 4), x.sort().values):
        assert checksums(other) != known


def test_the_last_partial_block_counts_as_well():
    x = torch.zeros(BLOCK + 1, dtype=torch.int8)
    known = checksums(x)
    x[-1] = 1
    assert [a == b for a, b in zip(checksums(x), known, strict=True)] == [True, False]


def test_a_tensor_that_was_made_shorter_is_read_no_further_than_it_goes():
    tensors = [torch.zeros(3 * BLOCK)]
    watch = Watch(tensors)
    tensors[0].data = tensors[0].data[:5]
    watch._turn = 1  # a block that is gone
    assert calls_until_seen(watch, tensors, CALLS) is not None
