"""max_activation_memory in tune: predicted as it is reported, and kept by all that may run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mpq_fx
from mpq_fx.activation_memory import peak
from mpq_fx.errors import InfeasibleError


class Net(nn.Module):
    """One large value between ops: what `down` reads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(16, 256), nn.Linear(256, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


class Two(nn.Module):
    """Two graphs, the second with the larger values."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = Net(), Net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(doubled(self.first(x))).sum()


@torch.compiler.disable
def doubled(x: torch.Tensor) -> torch.Tensor:
    """Between two graphs."""
    return torch.cat([x, x])


BATCHES = [torch.randn(8, 16, generator=torch.Generator().manual_seed(k)) for k in range(6)]
WIDE = 8 * 256 * 4  # bytes of gelu's result, and of what it reads


def tune(model, **options):
    options = {"target": "reference", "tolerance": 0.1, **options}
    return mpq_fx.tune(model.eval(), BATCHES, config=mpq_fx.Config(**options), progress=False)


@pytest.mark.parametrize(
    ("limit", "formats", "held"),
    [
        (None, None, 2 * WIDE),
        ("0.8x", None, WIDE + WIDE / 4),
        ("0.8x", ["bfloat16"], WIDE + WIDE / 2),
        (1.6 * WIDE, ["bfloat16"], WIDE + WIDE / 2),
    ],
)
def test_the_plan_keeps_to_the_limit_and_predicts_what_is_reported(isolated, limit, formats, held):
    plan = tune(Net(), max_activation_memory=limit, formats=formats)
    reported = plan.activation_bytes[plan.winner]
    assert plan.activation_bytes["float"] == plan.baseline["activation_memory"] == 2 * WIDE
    assert reported == held or (limit is None and reported <= held)
    assert reported == peak(plan.live, plan.choices)
    again = plan.resolve()
    assert again.provenance["predicted"]["activation_memory"] == peak(again.live, again.choices)
    assert again.provenance["predicted"]["activation_memory"] <= plan.budgets.get(
        "max_activation_memory", 2 * WIDE
    )


def test_a_limit_out_of_reach_is_named_with_the_least_there_is(isolated):
    with pytest.raises(InfeasibleError) as caught:
        tune(Net(), max_activation_memory=WIDE)
    assert caught.value.what.startswith(f"no plan meets max_activation_memory <= {WIDE} bytes\n")
    assert caught.value.fix == f'options={{"max_activation_memory": {WIDE + WIDE // 4}}}'


@pytest.mark.onednn
def test_no_variant_above_the_limit_runs(isolated):
    plan = tune(Net(), max_activation_memory="0.7x", target="cpu", time_budget=1.0)
    variants = {n: held for n, held in plan.activation_bytes.items() if n != "float"}
    assert variants
    assert all(held <= plan.budgets["max_activation_memory"] for held in variants.values())
    assert variants[plan.winner] == peak(plan.live, plan.choices)


def test_of_several_graphs_the_larger_peak_counts(isolated):
    plan = tune(Two(), max_activation_memory="0.8x")
    assert plan.baseline["activation_memory"] == 2 * 2 * WIDE
    assert peak(plan.live, {}) == 2 * 2 * WIDE
    assert plan.activation_bytes[plan.winner] == peak(plan.live, plan.choices)
