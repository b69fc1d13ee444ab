"""Every architecture through the whole path: observed, planned, quantized, in other shapes too."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import mpq_fx
from mpq_fx.registry import bindings_of
from tests.architectures import ARCHITECTURES, VOCABULARY, decode
from tests.toy_backend import called, worst

CALLS = 3
LIMIT = 0.25  # relative RMS of tiny random nets, which have nothing to average errors over
OPTIONS = {
    "objective": "size",  # as many integers as there can be
    "tolerance": LIMIT / 2,
    "calibration_calls": CALLS,
    "time_budget": 30.0,
}
QUICK = ("bert", "resnet", "llama", "mixtral", "unet")  # for every run of the tests
SLOW = ("vit", "swin", "mobilenet", "qwen", "gpt2", "whisper", "mamba")


def varied(given: Any, k: int) -> Any:
    """Other tokens, or other values, of the same shapes; a mask stays as it is."""

    def vary(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if x.is_floating_point():
            return x.roll(k) * (1 + 0.05 * k)
        return (x + k) % VOCABULARY if x.max() > 1 else x

    return tree_map(vary, given)


def planned(net: nn.Module, given: Any, target: str) -> nn.Module:
    """The net after its calls were observed and its plan was solved."""
    compiled = torch.compile(net, backend="mpq", options={**OPTIONS, "target": target})
    for k in range(CALLS):
        called(compiled, varied(given, k + 1))
    return compiled


def integers(compiled: Any) -> list[list[str]]:
    """For each graph with a plan, its sites that run in int8 or int4."""
    plans = [binding.plan for _, binding in bindings_of(compiled)]
    return [
        [site for site, choice in plan.choices.items() if choice.weight.startswith("int")]
        for plan in plans
        if plan is not None
    ]


def check(name: str, target: str) -> None:
    net, shapes = ARCHITECTURES[name]()
    with torch.no_grad():
        compiled = planned(net, shapes[0], target)
        for given in shapes:
            error = worst(called(compiled, given), called(net, given))
            assert 0 < error <= LIMIT
    assert all(integers(compiled)), "every graph runs some sites in integers"
    assert len(integers(compiled)) == len(shapes), "the second shape takes the plan of the first"


def test_every_architecture_is_here_but_the_one_that_dynamo_does_not_capture():
    assert {*QUICK, *SLOW, "lstm"} == set(ARCHITECTURES)


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_quantized_on_the_reference_target_in_two_shapes(isolated, name):
    check(name, "reference")


@pytest.mark.onednn
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [*QUICK, *SLOW])
def test_quantized_and_compiled_by_inductor_in_two_shapes(isolated, name):
    check(name, "cpu")


def test_an_lstm_runs_in_float_and_the_report_says_so(isolated):
    net, shapes = ARCHITECTURES["lstm"]()
    with torch.no_grad():
        compiled = planned(net, shapes[0], "reference")
        for given in shapes:
            assert worst(called(compiled, given), called(net, given)) == 0
    assert integers(compiled) == []
    assert "captured" in str(mpq_fx.explain(compiled))


def test_a_decode_loop_with_a_static_cache_is_quantized_and_writes_its_cache(isolated):
    """Prompts teach the plan; then prompt and single tokens run in integers, through one cache."""
    net, steps = decode()
    compiled = torch.compile(net, backend="mpq", options={**OPTIONS, "target": "reference"})
    with torch.no_grad():
        for k in range(CALLS + 1):
            cache, expected = net.new_cache(), net.new_cache()
            for (ids,) in steps:
                got, want = compiled(varied(ids, k), cache), net(varied(ids, k), expected)
            assert worst([got], [want]) <= LIMIT
            layers = zip(cache.layers, expected.layers, strict=True)
            pairs = [(a, b) for c, e in layers for a, b in ((c.keys, e.keys), (c.values, e.values))]
            assert worst(*map(list, zip(*pairs, strict=True))) <= LIMIT
    assert any(integers(compiled))


def test_two_copies_of_one_architecture_have_their_own_plans(isolated):
    net, shapes = ARCHITECTURES["bert"]()
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.9)
        both = [planned(each, shapes[0], "reference") for each in (net, twin)]
        for compiled, each in zip(both, (net, twin), strict=True):
            assert worst(called(compiled, shapes[0]), called(each, shapes[0])) <= LIMIT
