"""A small graph with its sites, weights and recorded calls, as the passes see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import functional

from mpq_fx.facts import Choice, Site
from mpq_fx.formats import format_named
from mpq_fx.graph import clone, placeholders
from mpq_fx.passes.analyze.replay import Replayer, replayer
from mpq_fx.passes.analyze.sites import find_sites
from tests.architectures import values
from tests.toy_backend import graph_of

BF16 = Choice("bfloat16", "bfloat16")
DYNAMIC = Choice("int8", "int8", "dynamic")
STATIC = Choice("int8", "uint8_tensor", "static")
WEIGHT_ONLY = Choice("int4", "bfloat16")
UINT8 = format_named("uint8_tensor")


@dataclass(frozen=True)
class Subject:
    """function(*inputs, *weights) -> tuple, captured."""

    gm: GraphModule
    weights: dict[str, Tensor]  # placeholder -> value
    calls: tuple[tuple[Any, ...], ...]

    @property
    def sites(self) -> list[Site]:
        return find_sites(self.gm, {name: f"{name}.weight" for name in self.weights})

    @property
    def copy(self) -> GraphModule:
        return clone(self.gm)[0]

    def replay(self, **options: Any) -> Replayer:
        return replayer(self.gm, self.sites, self.weights, **options)


def subject(function, weights, *shape: int, calls: int = 3) -> Subject:
    inputs = [values(*shape, k + 1)[..., 0] for k in range(calls)]
    gm = graph_of(function, [inputs[0]], weights)
    names = [node.name for node in placeholders(gm)][1:]
    given = dict(zip(names, weights, strict=True))
    return Subject(gm, given, tuple((x, *weights) for x in inputs))


def chain(x, up, down, bias):
    """Two linear sites, glue between them and around them."""
    y = functional.linear(functional.gelu(functional.linear(x, up)), down, bias)
    return (torch.relu(x + y), y.argmax(-1))


def heads(x, q, k, v, bias):
    """q/k/v read one tensor; one has a bias, two have none."""
    return (
        functional.linear(x, q),
        functional.linear(x, k, bias),
        functional.linear(x, v),
    )


@pytest.fixture
def net() -> Subject:
    return subject(chain, (values(24, 16), values(16, 24), values(16)), 5, 16)


@pytest.fixture
def qkv() -> Subject:
    return subject(heads, (values(16, 16), values(8, 16), values(12, 16), values(8)), 5, 16)
