"""Weights may change: the next call runs on the new ones (all kinds of edits: test_bindings.py)."""

from __future__ import annotations

import torch

import mpq_fx
from mpq_fx.numerics import relative_rms
from mpq_fx.watch import CALLS


def test_an_edit_is_seen_on_the_next_call_and_a_data_edit_within_the_stated_number(isolated, world):
    model = world.Net()
    compiled = world.quantized(model)

    def error() -> float:
        with torch.inference_mode():
            return relative_rms(compiled(world.batch(7)), model(world.batch(7)))

    assert 0 < error() < 0.1
    with torch.no_grad():
        model.down.weight.mul_(-2)
    assert error() < 0.1
    model.up.weight.data += 0.3
    assert min(error() for _ in range(CALLS)) < 0.1
    model.up.weight.data[0, 0] += 30.0
    assert mpq_fx.refresh(compiled) == ["up.weight"]
    assert error() < 0.1
