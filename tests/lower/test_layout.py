"""Outputs lie in memory as those of the user's graph do, whatever kernels hand over."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mpq_fx.passes.lower.layout import order_of
from mpq_fx.registry import bindings_of


class Maps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 24, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.relu(self.first(x))
        return self.last(y), y.mT


@pytest.mark.onednn
@pytest.mark.parametrize("target", ["cpu", "reference"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_planned_model_has_the_strides_of_the_float_one(isolated, target, layout, dynamic):
    model = Maps().eval().to(memory_format=layout)
    options = {"target": target, "tolerance": 0.2, "objective": "size", "time_budget": 2.0}
    compiled = torch.compile(
        model, backend="mpq", dynamic=dynamic, options={**options, "calibration_calls": 3}
    )
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(2, 16, 8, 8).to(memory_format=layout)
            results = compiled(x)
        wanted = model(x)
    ((_, binding),) = bindings_of(compiled)
    assert any(choice.weight != "float32" for choice in binding.plan.choices.values())
    assert binding.installed is not None
    assert [y.stride() for y in results] == [y.stride() for y in wanted]
    results[0].view(-1) if layout == torch.contiguous_format else results[0].mT


def test_the_order_of_dimensions_is_that_of_steps_longer_than_one():
    x = torch.empty(2, 3, 4, 5)
    assert order_of(x) == (0, 1, 2, 3)
    assert order_of(x.to(memory_format=torch.channels_last)) == (0, 2, 3, 1)
    assert order_of(torch.empty(1, 3, 1, 5)) == (1, 3)
    assert order_of(x.mT) == (0, 1, 3, 2)
    assert order_of(x[:, :, ::2]) is None
    assert order_of(torch.empty(3, 1).expand(3, 4)) is None
    assert order_of(torch.empty(())) == ()
