"""The runner of passes: what its environment variables leave out."""

from __future__ import annotations

import pytest
import torch
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from mpq_fx.errors import ConfigError
from mpq_fx.graph import ops, run_passes

aten = torch.ops.aten


def remove_relu(gm: GraphModule) -> int:
    return removed(gm, aten.relu.default)


def remove_neg(gm: GraphModule) -> int:
    return removed(gm, aten.neg.default)


def removed(gm: GraphModule, target) -> int:
    found = gm.graph.find_nodes(op="call_function", target=target)
    for node in found:
        node.replace_all_uses_with(node.args[0])
    return len(found)


@pytest.mark.parametrize(
    ("environment", "left"),
    [
        ({}, "exp"),
        ({"MPQ_SKIP": "remove_relu"}, "relu exp"),
        ({"MPQ_SKIP": "remove_relu,remove_neg"}, "relu neg exp"),
        ({"MPQ_FUEL": "1"}, "neg exp"),
        ({"MPQ_FUEL": "0"}, "relu neg exp"),
        ({"MPQ_FUEL": "2"}, "exp"),
    ],
    ids=str,
)
def test_passes_are_left_out_by_name_or_by_number(monkeypatch, environment, left):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    gm = make_fx(lambda x: (-x.relu()).exp())(torch.randn(3))
    run_passes(gm, [remove_relu, remove_neg])
    assert ops(gm) == left


def test_a_number_of_passes_that_is_none_is_refused(monkeypatch):
    monkeypatch.setenv("MPQ_FUEL", "many")
    with pytest.raises(ConfigError, match="MPQ_FUEL='many' is not a number"):
        run_passes(make_fx(torch.relu)(torch.randn(3)), [])
