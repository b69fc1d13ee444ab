"""A small net, compiled on the target that generates no code, and what to ask about it."""

from __future__ import annotations

import torch
from torch import nn

import mpq_fx
from mpq_fx.config import Config
from mpq_fx.registry import bindings_of

OPTIONS = {"target": "reference", "tolerance": 0.1, "calibration_calls": 3}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


class Tied(nn.Module):
    """A head that reads the weight of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.block = nn.Embedding(300, 32), nn.Linear(32, 32)
        self.head = nn.Linear(32, 300, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.block(self.table(ids))))


def batch(seed: int, size: int = 4) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.randn(size, 32, generator=torch.Generator().manual_seed(seed))


def zeros(_: int) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.zeros(4, 32)


def compiled_of(model: nn.Module, **options):
    return torch.compile(model.eval(), backend="mpq", options={**OPTIONS, **options})


def call(compiled, calls: int = 3, make=batch):
    with torch.inference_mode():
        return [compiled(make(seed)) for seed in range(calls)]


def state(compiled):
    """(calls kept, why it runs in float or "")"""
    ((_, binding),) = bindings_of(compiled)
    return len(binding.records), binding.reason


def is_float(compiled, model) -> bool:
    with torch.inference_mode():
        return torch.equal(compiled(batch(9)), model(batch(9)))


def tune(model: nn.Module):
    config = Config(target="reference", tolerance=0.1)
    return mpq_fx.tune(model, [batch(seed) for seed in range(3)], config=config, progress=False)
