"""Mixtures of choices: a plan's own error, and derivatives by finite differences."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch.nn import functional

from mpq_fx.facts import Choice
from mpq_fx.passes.analyze.mixture import Mixture, mixed
from mpq_fx.passes.analyze.replay import Replayer, output_error
from tests.architectures import values
from tests.passes.conftest import BF16, DYNAMIC, WEIGHT_ONLY, subject

FLOAT = Choice("float32", "float32")
OPTIONS = (FLOAT, BF16, DYNAMIC, WEIGHT_ONLY)


def mixture_of(net, shares) -> Mixture:
    return Mixture(net.replay(), {site.name: OPTIONS for site in net.sites}, shares)


def plan_of(net, *choices: Choice) -> dict[tuple[str, str], float]:
    """Shares of a plan: all of one choice in each site."""
    return {
        (site.name, option.name): float(option == choice)
        for site, choice in zip(net.sites, choices, strict=True)
        for option in OPTIONS
    }


def run(net, shares, call=0, excluded=frozenset()):
    reference = net.replay().run(net.calls[call], {})
    return mixed(mixture_of(net, shares), net.calls[call], reference, excluded)


@pytest.mark.parametrize(
    "choices", [(FLOAT, FLOAT), (FLOAT, DYNAMIC), (WEIGHT_ONLY, BF16), (DYNAMIC, DYNAMIC)]
)
def test_all_of_one_choice_is_the_plan(net, choices):
    replay = net.replay()
    plan = {s.name: c for s, c in zip(net.sites, choices, strict=True)}
    error = output_error(replay.run(net.calls[1], plan), replay.run(net.calls[1], {}))
    assert run(net, plan_of(net, *choices), call=1)[0] == pytest.approx(error**2, rel=1e-9)


def two_branches(x, one, two):
    return (functional.linear(x, one) + functional.linear(x, two),)


def test_derivatives_are_those_of_the_noise():
    """Of sites beside each other nothing on the way back is an approximation."""
    net = subject(two_branches, (values(12, 16), values(12, 16, 2)[..., 0]), 5, 16)
    source = torch.Generator().manual_seed(3)
    shares = {key: float(torch.rand((), generator=source)) for key in plan_of(net, FLOAT, FLOAT)}
    _, found = run(net, shares)
    for key in shares:
        up, down = (run(net, {**shares, key: shares[key] + h})[0] for h in (1e-2, -1e-2))
        assert found[key] == pytest.approx((up - down) / 2e-2, rel=1e-3, abs=1e-6)


def slope_and_change(net, behind: Choice, step: float) -> tuple[float, float]:
    """From half bfloat16 to int4 weights in the first site: as derived, and as measured."""
    first = net.sites[0].name
    shares = plan_of(net, BF16, behind)
    shares |= {(first, BF16.name): 0.5, (first, WEIGHT_ONLY.name): 0.5}
    noise, found = run(net, shares)
    moved = {**shares, (first, BF16.name): 0.5 - step, (first, WEIGHT_ONLY.name): 0.5 + step}
    slope = found[first, WEIGHT_ONLY.name] - found[first, BF16.name]
    return slope, (run(net, moved)[0] - noise) / step


def test_derivatives_of_a_deep_site_go_through_all_that_is_behind_it(net):
    slope, change = slope_and_change(net, FLOAT, 1e-3)
    assert slope == pytest.approx(change, rel=0.01)


def test_behind_a_rounding_site_the_way_back_is_its_float_op(net):
    slope, change = slope_and_change(net, DYNAMIC, 0.2)
    assert slope == pytest.approx(change, rel=0.3)


def test_at_the_float_model_nothing_slopes(net):
    noise, found = run(net, plan_of(net, FLOAT, FLOAT))
    assert noise == 0.0
    assert set(found.values()) == {0.0}


def test_planted_pairs_slope_towards_what_helps():
    """Beside its twin's error a site's own adds to it; beside the opposite one it takes it back."""
    weight, third = values(12, 16), values(12, 16, 3)[..., 0]

    def three(x, one, two, other):
        return (
            functional.linear(x, one) + functional.linear(x, two) + functional.linear(x, other),
        )

    for sign in (1.0, -1.0):
        net = subject(three, (weight, sign * weight, third), 5, 16)
        one, two, _ = (site.name for site in net.sites)
        noise, found = run(net, plan_of(net, WEIGHT_ONLY, FLOAT, FLOAT))
        rise = found[two, WEIGHT_ONLY.name] - found[two, FLOAT.name]
        assert rise == pytest.approx(sign * 2 * noise, rel=0.02)
        own = found[one, WEIGHT_ONLY.name] - found[one, FLOAT.name]
        assert own == pytest.approx(2 * noise, rel=0.02)


def test_the_worst_output_counts_and_caches_do_not(qkv):
    one = {s.name: (DYNAMIC if k == 1 else FLOAT) for k, s in enumerate(qkv.sites)}
    shares = plan_of(qkv, *one.values())
    noise, found = run(qkv, shares)
    assert noise > 0.0
    first, second, _ = (site.name for site in qkv.sites)
    assert all(found[first, c.name] == 0.0 for c in OPTIONS), "another output is the worst"
    assert found[second, DYNAMIC.name] != found[second, FLOAT.name]
    assert run(qkv, shares, excluded=frozenset({1}))[0] == 0.0
    assert run(qkv, shares, excluded=frozenset({0, 1, 2}))[0] == 0.0


def test_a_result_that_is_not_finite_has_no_slope(net):
    calls = [torch.full_like(net.calls[0][0], 3e38), *net.calls[0][1:]]
    reference = net.replay().run(net.calls[0], {})
    noise, found = mixed(
        mixture_of(net, plan_of(net, DYNAMIC, DYNAMIC)), calls, reference, frozenset()
    )
    assert noise == math.inf
    assert set(found.values()) == {0.0}


def test_parameters_get_no_gradient_and_records_stay_as_they_are(net):
    before = [x.clone() for x in net.calls[0]]
    run(net, plan_of(net, DYNAMIC, BF16))
    assert all(torch.equal(a, b) for a, b in zip(before, net.calls[0], strict=True))
    assert not any(x.requires_grad or x.grad is not None for x in net.calls[0])


def test_records_and_weights_of_inference_mode_are_taken(net):
    with torch.inference_mode():
        calls = [tuple(x.clone() for x in call) for call in net.calls]
    shares = plan_of(net, DYNAMIC, BF16)
    reference = net.replay().run(net.calls[0], {})
    found = mixed(mixture_of(net, shares), calls[0], reference, frozenset())
    assert found == run(net, shares)


@pytest.fixture
def asked(monkeypatch) -> Counter[str]:
    """How often a choice was computed."""
    found: Counter[str] = Counter()
    plain = Replayer.compute

    def compute(self, site, choice, *operands):
        found[choice.name] += 1
        return plain(self, site, choice, *operands)

    monkeypatch.setattr(Replayer, "compute", compute)
    return found


def test_each_choice_is_computed_once_and_those_of_the_plan_once_more(net, asked):
    run(net, plan_of(net, DYNAMIC, FLOAT))
    assert asked == {DYNAMIC.name: 3, BF16.name: 2, WEIGHT_ONLY.name: 2}


def test_a_choice_without_a_share_is_not_computed(net, asked):
    shares = {key: share for key, share in plan_of(net, DYNAMIC, FLOAT).items() if share}
    noise, found = run(net, shares)
    assert found.keys() == shares.keys()
    assert asked == {DYNAMIC.name: 2}
    whole = run(net, plan_of(net, DYNAMIC, FLOAT))
    assert noise == whole[0]
    assert found == {key: whole[1][key] for key in shares}
