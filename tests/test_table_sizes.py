"""Bytes and work in the tables of a plan: of weights that sites share, and of the calls seen."""

from __future__ import annotations

import torch
from torch import nn

import mpq_fx
from mpq_fx.problem import total
from tests.small import Tied, batch


def tune(model, batches, **options):
    config = mpq_fx.Config(**{"target": "reference", "tolerance": 0.1, **options})
    return mpq_fx.tune(model, batches, config=config, progress=False)


class Repeated(Tied):
    """A block that is called twice besides."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(torch.relu(self.block(self.table(ids)))))


def test_a_weight_of_several_sites_is_as_large_as_it_is():
    made, generator = Repeated().eval(), torch.Generator().manual_seed(0)
    ids = [torch.randint(300, (2, 8), generator=generator) for _ in range(4)]
    held = sum(p.numel() * p.element_size() for p in made.parameters())
    found = tune(made, ids, tolerance=None, objective="error", max_size="0.5x")
    assert found.baseline["size"] == held
    assert found.budgets["max_size"] == held / 2
    taken = {s: choice.name for s, choice in found.choices.items()}
    assert total(found.tables["size"], taken) + 4 * 32 <= held / 2  # and the bias
    halves = dict.fromkeys(taken, "bfloat16")  # each op has a copy in a layout of its own
    assert total(found.tables["size"], halves) == 2 * 2 * 300 * 32 + 2 * 32 * 32


class Products(nn.Module):
    """Matrix products whose work is a square of the number of rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(x)
        return x @ x.transpose(-1, -2) @ x


def test_work_is_that_of_a_recorded_call_and_not_of_the_first_one(isolated):
    rows = (3, 5, 64, 64, 64, 64)  # a graph of any size is compiled at 5
    found = tune(Products().eval(), [batch(k, size)[None] for k, size in enumerate(rows)])
    squares = 2 * 64 * 64 * 32
    assert sum(row.site.macs for row in found.ledger) == squares + 64 * 32 * 32
    assert found.baseline["bops"] == 32 * 32 * (squares + 64 * 32 * 32)
