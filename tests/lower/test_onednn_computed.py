"""Target "cpu" on what a call computes itself, and on calls without rows, in templates."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mpq_fx import settle
from mpq_fx.numerics import relative_rms
from mpq_fx.passes.lower import cpu
from mpq_fx.passes.lower.inductor import ALL
from mpq_fx.registry import bindings_of
from tests.small import Net

pytestmark = pytest.mark.onednn


class Computed(nn.Module):
    """What a call computes itself: a vector of weights, a matrix, a bias, a filter; and one row."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.up, self.down = kind, nn.Linear(32, 32), nn.Linear(32, 32)
        self.vector, self.filter = nn.Parameter(torch.randn(32)), nn.Linear(32, 4 * 4 * 9)

    def forward(self, x):
        y, linear = torch.relu(self.up(x)), nn.functional.linear
        if self.kind == "vector":
            return linear(y, self.vector)
        if self.kind == "matrix":
            return linear(y, self.down(x))
        if self.kind == "bias":
            return linear(y, self.down.weight, x.mean(0))
        if self.kind == "filter":
            image = y[:, :16].reshape(1, 4, -1, 4)
            w = self.filter(y[:1]).view(4, 4, 3, 3)
            return nn.functional.conv2d(image, w, y.mean(0)[:4], padding=1)
        return self.down(y.mean(0))


@pytest.mark.parametrize("kind", ["vector", "matrix", "bias", "filter", "one row"])
@pytest.mark.parametrize("fmt", ["bfloat16", "int8*uint8_tensor/static"])
def test_what_a_call_computes_is_packed_by_nobody(isolated, kind, fmt):
    if fmt != "bfloat16" and not cpu.has("vnni"):
        fmt = "int8*int7_tensor/static"
    options = {"formats": [fmt], "tolerance": 0.2, "objective": "size", "calibration_calls": 4}
    model, given = Computed(kind).eval(), [torch.randn(8, 32) for _ in range(6)]
    compiled = torch.compile(model, backend="mpq", options={"target": "cpu", **options})
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(settle, "_modes", lambda *_: (ALL,))  # templates want constants
        patch.setattr(settle, "_worth_compiling", lambda *_: ())
        for x in given:
            assert relative_rms(compiled(x), model(x)) < 0.2
    ((_, binding),) = bindings_of(compiled)
    assert binding.plan is not None, binding.reason
    assert "up" in binding.plan.choices


def test_a_call_without_rows_runs_where_templates_won(isolated, monkeypatch):
    monkeypatch.setattr(settle, "_modes", lambda *_: (ALL,))
    monkeypatch.setattr(settle, "_worth_compiling", lambda *_: ())
    model = Net().eval()
    options = {"target": "cpu", "tolerance": 0.2, "objective": "size", "calibration_calls": 3}
    compiled = torch.compile(model, backend="mpq", options=options)
    with torch.no_grad():
        for _ in range(4):
            compiled(torch.randn(8, 32))
        assert compiled(torch.randn(0, 32)).shape == (0, 32)
    assert all(b.plan.ledger[0].mode.startswith(ALL) for _, b in bindings_of(compiled))
