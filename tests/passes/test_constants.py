"""What depends on weights alone is computed once, owned, and computed again for edited weights."""

from __future__ import annotations

import weakref

import torch

from mpq_fx.graph import ops, placeholders
from mpq_fx.passes.lower import constants
from mpq_fx.passes.lower.constants import evaluate, fold_constants
from mpq_fx.passes.rewrite import rewrite
from tests.architectures import values
from tests.passes.conftest import DYNAMIC, subject
from tests.toy_backend import graph_of


def folded(subject):
    return fold_constants(subject.copy, subject.weights)


def run(found, call):
    live = [call[k] for k in found.live]
    passed = [getattr(found.gm, name) for name in found.passed]
    return found.gm(*live, *passed)


def test_folding_keeps_the_numbers_and_takes_the_weights_out(net):
    gm = net.copy
    rewrite(gm, net.sites, {site.name: DYNAMIC for site in net.sites}, {})
    found = fold_constants(gm, net.weights)
    assert "quantize_weight" not in ops(found.gm)
    for call in net.calls:
        assert torch.equal(run(found, call)[0], gm(*call)[0])
    bias = [node.name for node in placeholders(net.gm)][-1]
    kept = {node.name for node in placeholders(found.gm)} - {*found.passed}
    assert kept & set(net.weights) <= {bias}, "only the bias is still read as it is"


def test_an_edited_weight_touches_its_own_constants_only(net):
    gm = net.copy
    rewrite(gm, net.sites, {site.name: DYNAMIC for site in net.sites}, {})
    found = fold_constants(gm, net.weights)
    first = next(iter(net.weights))
    edited = {**net.weights, first: net.weights[first] * -2}
    touched = [recipe for recipe in found.recipes if first in recipe.parameters]
    assert touched
    assert all(recipe.parameters == (first,) for recipe in touched)
    for name, value in evaluate(gm, touched, edited).items():
        getattr(found.gm, name).copy_(value)
    call = (net.calls[0][0], *edited.values())
    assert torch.equal(run(found, call)[0], gm(*call)[0])


def test_a_weight_that_two_sites_share_is_computed_once():
    def tied(x, w):
        return (torch.relu(x @ (w * 2).T) @ (w * 2).T,)

    found = folded(subject(tied, (values(16, 16),), 4, 16))
    assert len(found.recipes) == 1
    assert ops(found.gm).split().count("mul") == 0


def test_views_of_a_weight_stay_live():
    def viewed(x, w, v):
        return (x @ w.t() + (v * 3), x.mean())

    net = subject(viewed, (values(8, 16), values(8)), 4, 16)
    found = folded(net)
    assert [recipe.parameters for recipe in found.recipes] == [(list(net.weights)[1],)]
    kept = [node.name for node in placeholders(found.gm)]
    assert [name in kept for name in net.weights] == [True, False]
    x, w, v = net.calls[0]
    assert torch.equal(run(found, (x, w * 5, v))[0], net.gm(x, w * 5, v)[0]), "read on every call"


def test_a_constant_never_shares_memory_with_the_weight():
    def cast(x, w):
        return (x @ torch.ops.aten.to.dtype(w, torch.float32).T,)

    net = subject(cast, (values(16, 16),), 4, 16)
    found = folded(net)
    weight = next(iter(net.weights.values()))
    (recipe,) = found.recipes
    assert getattr(found.gm, recipe.name).data_ptr() != weight.data_ptr()


def test_constants_are_no_inference_tensors_so_that_they_can_be_refreshed(net):
    with torch.inference_mode():
        gm = net.copy
        rewrite(gm, net.sites, {net.sites[0].name: DYNAMIC}, {})
        found = fold_constants(gm, net.weights)
    assert found.recipes
    assert not any(getattr(found.gm, r.name).is_inference() for r in found.recipes)


def test_what_lies_between_is_let_go_after_the_last_constant_that_needs_it(monkeypatch):
    """Else a refresh, and every compilation, would hold all weights once more."""

    def net(x, first, second):
        return x @ torch.relu(first).neg(), x @ torch.relu(second).neg()

    gm = graph_of(net, [torch.randn(2, 4)], [torch.randn(4, 4), torch.randn(4, 4)])
    names = [node.name for node in placeholders(gm)][1:]
    parameters = {name: torch.randn(4, 4) for name in names}
    recipes = fold_constants(gm, parameters).recipes
    alive, compute = [], constants._value

    def watched(*args):
        alive.append(sum(ref() is not None for ref in refs))
        value = compute(*args)
        refs.append(weakref.ref(value))
        return value

    refs: list[weakref.ref] = []
    monkeypatch.setattr(constants, "_value", watched)
    found = evaluate(gm, recipes, parameters)
    assert len(found) == 2
    assert max(alive) <= 3  # of six: the first constant, and what the second is made from
