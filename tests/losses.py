"""A small classifier with labeled batches, and how to tune it with a loss."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

import mpq_fx


class Net(nn.Module):
    """32 numbers -> 4 classes, in the structure that a test wants."""

    def __init__(self, pack=lambda y: y) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(32, 24), nn.Linear(24, 4)
        self.pack = pack

    def forward(self, x, scale=None):
        y = self.down(functional.gelu(self.up(x)))
        return self.pack(y if scale is None else y * scale)


def batches(*sizes: int):
    made = []
    for seed, size in enumerate(sizes or (6, 6, 6, 6)):
        source = torch.Generator().manual_seed(seed)
        x = torch.randn(size, 32, generator=source)
        made.append({"x": x, "labels": torch.randint(4, (size,), generator=source)})
    return made


def cross_entropy(output, batch):
    return functional.cross_entropy(output, batch["labels"])


def of_labels(shift: int):
    """The loss of other labels, where `shift` is not 0."""

    def loss(output, batch):
        return functional.cross_entropy(output, (batch["labels"] + shift) % 4)

    return loss


def config(**options):
    given = {"target": "reference", "tolerance": 0.1, "sensitivity": "interlayer_loss"}
    return mpq_fx.Config(**{**given, **options})


def tune(model, given=None, loss=cross_entropy, path=None, **options):
    asked = {"loss": loss, "config": config(**options), "checkpoint": path}
    given = batches() if given is None else given
    return mpq_fx.tune(model.eval(), given, progress=False, **asked)
