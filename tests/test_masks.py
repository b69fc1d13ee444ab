"""Inputs that are not finite: masks are data, the rest is none."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tests.small import Net, batch, compiled_of, state


class Attending(Net):
    """Scores with a mask that the caller adds."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q = self.up(x)
        return self.down(nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask))


@pytest.mark.parametrize("sensitivity", ["auto", "masked", "fisher"])
def test_calls_with_a_mask_of_minus_infinity_are_data(isolated, sensitivity):
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    compiled = compiled_of(Attending(), sensitivity=sensitivity)
    with torch.inference_mode():
        for seed in range(3):
            compiled(batch(seed), mask)
    assert state(compiled) == (0, "")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_calls_with_data_that_is_not_finite_are_not(isolated, value):
    compiled = compiled_of(Net())
    with torch.inference_mode():
        for seed in range(3):
            compiled(batch(seed).index_fill(0, torch.tensor([1]), value))
        compiled(torch.full((4, 32), value))
    assert state(compiled) == (0, "observing")
