"""One small net, its batches, what a user does with them, on the target that generates no code."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mpq_fx import Config
from mpq_fx.registry import bindings_of

FORMATS = ("bfloat16", "int8*int8_asym/dynamic", "int8*uint8_tensor/static")  # few: quickly solved
OPTIONS = {"target": "reference", "tolerance": 0.1, "calibration_calls": 3, "formats": FORMATS}


class Net(nn.Module):
    """Every kind of row that a ledger can have: linear with and without a twin, attention, glue."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.query, self.key, self.value = (nn.Linear(32, 32) for _ in range(3))
        self.norm = nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = (
            f(x).unflatten(-1, (4, 8)).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        attended = nn.functional.scaled_dot_product_attention(*heads)
        x = self.norm(x + attended.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(x)))


class Broken(Net):
    """The same net with a graph break before its second half."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x + self.query(x))
        torch._dynamo.graph_break()  # noqa: TID251 -- as a user would
        return x + self.down(nn.functional.gelu(self.up(x)))


class World:
    """What tests say often."""

    Net, Broken, options = Net, Broken, OPTIONS

    @staticmethod
    def batch(seed: int, size: int = 4) -> torch.Tensor:
        with torch.inference_mode(False):  # else Dynamo takes it for another kind of tensor
            return torch.randn(size, 6, 32, generator=torch.Generator().manual_seed(seed))

    @classmethod
    def compiled(cls, model: nn.Module, **options):
        return torch.compile(model.eval(), backend="mpq", options={**OPTIONS, **options})

    @classmethod
    def calibrate(cls, compiled, calls: int = 3) -> None:
        with torch.inference_mode():
            for seed in range(calls):
                compiled(cls.batch(100 + seed))

    @classmethod
    def quantized(cls, model: nn.Module, **options):
        compiled = cls.compiled(model, **options)
        cls.calibrate(compiled)
        return compiled

    @staticmethod
    def config(**options) -> Config:
        return Config(**{**OPTIONS, **options})

    @staticmethod
    def bindings(compiled):
        return [binding for _, binding in bindings_of(compiled)]


@pytest.fixture(scope="session")
def world() -> type[World]:
    return World
