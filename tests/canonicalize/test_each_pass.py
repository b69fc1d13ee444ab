"""Laws that every pass keeps by itself, so that a new one is tested by being listed."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_leaves

from mpq_fx.graph import check, clone, remove_dead, signature_of
from mpq_fx.passes import CANONICALIZE
from tests.architectures import ARCHITECTURES
from tests.toy_backend import Toy, called, worst

NETS = ("resnet", "gpt2", "mamba", "unet", "bert")  # between them they use every pass


class Raw(Toy):
    """The captured graph before any pass, and what Dynamo called it with."""

    def __init__(self) -> None:
        super().__init__(passes=())
        self.inputs: list = []

    def __call__(self, gm, inputs):
        self.inputs.append(inputs)
        return super().__call__(gm, inputs)


@pytest.fixture(scope="module")
def captured():
    found = {}
    for name in NETS:
        net, inputs = ARCHITECTURES[name]()
        raw = Raw()
        with torch.no_grad():
            called(raw.compile(net), inputs[0])
        found[name] = raw.graph, raw.inputs[-1]
    return found


def results(gm, inputs):
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(gm(*inputs)) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("apply", CANONICALIZE, ids=lambda apply: apply.__name__)
def test_a_pass_alone_keeps_values_and_signature_and_is_idle_the_second_time(captured, apply):
    for name, (graph, inputs) in captured.items():
        gm, _ = clone(graph)
        signature, before = signature_of(gm), results(gm, inputs)
        changed = apply(gm)
        remove_dead(gm)
        check(gm, signature, f"{apply.__name__} on {name}")
        assert worst(results(gm, inputs), before) < 1e-5, name
        assert apply(gm) == 0, f"{name}: {changed} changes, and still not done"


def test_between_them_the_nets_use_every_pass(captured):
    used = set()
    for graph, _ in captured.values():
        gm, _ = clone(graph)
        for apply in CANONICALIZE:
            if apply(gm):
                used.add(apply.__name__)
                remove_dead(gm)
    unused = {apply.__name__ for apply in CANONICALIZE} - used
    assert unused <= {
        "spell_left_linear",
        "spell_einsum",
        "split_computed_bias",
        "merge_linear_bias",
        "remove_dropout",
    }
