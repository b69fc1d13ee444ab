"""Scores of layers: canonical correlation, pruning, Taylor's first term, and singles on noise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from mpq_fx.facts import Choice, Site
from mpq_fx.numerics import noise_power
from mpq_fx.passes import METRICS
from mpq_fx.passes.analyze.linearize import linearize, probes, reached
from mpq_fx.passes.analyze.metric import Task
from mpq_fx.passes.analyze.metrics.canonical_correlation import (
    correlation,
    leading,
    mean_correlations,
    view_of,
)
from mpq_fx.passes.analyze.metrics.masked import synthetic
from mpq_fx.passes.analyze.metrics.pruning import pruned, pruned_result
from mpq_fx.passes.analyze.metrics.taylor import changes
from tests.architectures import values
from tests.passes.conftest import Subject, subject

FLOAT, INT4 = Choice("float32", "float32"), Choice("int4", "float32")
CONV = Site("c", "conv", "c", weight_shape=(6, 3, 1, 1))
LINEAR = Site("l", "linear", "l", weight_shape=(6, 3))


def task_of(net: Subject) -> Task:
    return Task(net.replay(), {site.name: (FLOAT, INT4) for site in net.sites}, net.calls)


def chain(x, up, down):
    return (functional.linear(functional.gelu(functional.linear(x, up)), down),)


def branches(x, first, second, third):
    return tuple(functional.linear(x, w) for w in (first, second, third))


# --- canonical correlation ---------------------------------------------------------------------


def test_a_canonical_correlation_does_not_change_with_the_coordinates():
    x, y = values(200, 6), values(200, 6, 1)[..., 0].double() + 0.5 * values(200, 6)
    mixed = x.double() @ (torch.eye(6) + values(6, 6)).double()
    assert correlation(leading(x.double()), leading(mixed)) == pytest.approx(1.0, abs=1e-9)
    wanted = correlation(leading(x.double()), leading(y))
    assert correlation(leading(mixed), leading(y)) == pytest.approx(wanted, abs=1e-9)
    assert 0.3 < wanted < 0.9
    assert correlation(leading(x.double() + 100.0), leading(y)) == pytest.approx(wanted, abs=1e-9)


def test_what_is_unrelated_has_little_correlation():
    one, two = values(1000, 6).double(), values(1000, 6, 1)[..., 0].double()
    found = correlation(leading(one), leading(two))
    assert found is not None
    assert found < 0.15


def test_a_layer_that_tells_what_no_other_does_is_sensitive():
    first = torch.cat([values(4, 8), torch.zeros(4, 8)], 1)  # of the other half of the inputs
    third = torch.cat([torch.zeros(4, 8), values(4, 8, 1)[..., 0]], 1)
    net = subject(branches, (first, values(4, 4) @ first, third), 100, 16)
    task = task_of(net)
    at = linearize(task.replay, net.calls[0])
    one, two, alone = mean_correlations({s.name: s for s in net.sites}, at).values()
    assert one == pytest.approx(two, rel=0.1)
    assert one > 0.5
    assert alone < 0.3


def test_a_feature_map_is_observed_like_the_tokens_it_becomes():
    y = values(8, 6, 4, 5)
    found, wanted = view_of(CONV, y, 8), view_of(LINEAR, y.permute(0, 2, 3, 1).reshape(8, 20, 6), 8)
    assert found.positions == wanted.positions == 160
    assert torch.equal(found.by_position, wanted.by_position)
    assert torch.equal(found.by_sample, wanted.by_sample)


def test_layers_with_other_positions_are_compared_by_sample():
    tokens = values(32, 5, 6)
    pooled = tokens.mean(1) @ values(6, 6)
    one, two = (view_of(LINEAR, y, 32) for y in (tokens, pooled))
    assert (one.positions, two.positions) == (160, 32)
    assert correlation(one.by_sample, two.by_sample) == pytest.approx(1.0, abs=1e-6)


def test_layers_with_the_same_positions_are_compared_by_position():
    net = subject(branches, (values(6, 16), values(5, 16), values(4, 16)), 2, 50, 16)
    at = linearize(net.replay(), net.calls[0])
    assert at.samples == 2, "too few for a direction"
    found = mean_correlations({s.name: s for s in net.sites}, at)
    assert set(found) == {s.name for s in net.sites}


@pytest.mark.parametrize(
    "y",
    [
        torch.ones(40, 6),
        values(3, 6),
        torch.full((40, 6), float("nan")),
        torch.zeros(0, 6),
        values(6),
    ],
    ids=["constant", "few", "not finite", "empty", "one vector"],
)
def test_what_cannot_be_compared_has_no_directions(y):
    view = view_of(LINEAR, y, y.shape[0] or 1)
    assert view.by_position.shape[1] == 0
    assert correlation(view.by_position, leading(values(40, 6).double())) is None


def test_a_layer_without_another_one_counts_as_uncorrelated():
    net = subject(lambda x, w: (functional.linear(x, w),), (values(6, 8),), 40, 8)
    table = METRICS["canonical_correlation"](task_of(net))
    (site,) = net.sites
    assert table.provenance["uncompared"] == [site.name]
    wanted = METRICS["local_error"](task_of(net))
    assert table.values == pytest.approx(wanted.values)


# --- pruning -----------------------------------------------------------------------------------


def test_the_smaller_half_is_pruned():
    x = torch.tensor([[3.0, -1.0, 0.5], [-4.0, 2.0, -0.1]])
    assert pruned(x).tolist() == [[3.0, 0.0, 0.0], [-4.0, 2.0, 0.0]]
    equal = pruned(torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0]))
    assert equal.tolist() == [0.0, 0.0, 1.0, 1.0, -1.0]
    assert pruned(torch.ones(1)).tolist() == [1.0]
    columns = values(4, 6, 8).transpose(0, 2)
    assert pruned(columns).stride() == columns.stride(), "what reads it may be a view"
    assert pruned(torch.zeros(0)).numel() == 0


def test_a_layer_whose_half_is_zero_does_not_suffer():
    sparse = values(12, 16).masked_fill(torch.arange(16) % 2 == 0, 0.0)
    net = subject(branches, (values(12, 16), sparse, values(12, 16)), 5, 16)
    table = METRICS["pruning"](task_of(net))
    one, two, three = (table.values[site.name, INT4.name] for site in net.sites)
    assert two == 0.0
    assert min(one, three) > 0.0


def test_a_score_of_pruning_is_the_error_of_the_pruned_net():
    up, down = values(24, 16), values(12, 24)
    net = subject(chain, (up, down), 5, 16, calls=1)
    task = task_of(net)
    table = METRICS["pruning"](task)
    x, y = net.calls[0][0], net.gm(*net.calls[0])[0]
    local = {
        site.name: noise_power(task.replay.compute(site, INT4, node, args, kwargs), result)
        for site in net.sites
        for node, args, kwargs in [linearize(task.replay, net.calls[0]).operands[site.name]]
        for result in [linearize(task.replay, net.calls[0]).results[site.name].detach()]
    }
    errors = [noise_power(chain(x, *w)[0], y) for w in ((pruned(up), down), (up, pruned(down)))]
    for site, error in zip(net.sites, errors, strict=True):
        wanted = table.provenance["kappa"] * error * local[site.name]
        assert table.values[site.name, INT4.name] == pytest.approx(wanted, rel=1e-4)


def test_a_site_without_a_weight_loses_half_of_its_result():
    def product(x, w):
        y = functional.linear(x, w)
        return (y @ y.transpose(-1, -2),)

    net = subject(product, (values(12, 16),), 5, 16)
    task = task_of(net)
    at = linearize(task.replay, net.calls[0])
    site = next(site for site in net.sites if site.op == "matmul")
    found = pruned_result(task.replay, at, site.name)
    assert torch.equal(found, pruned(at.results[site.name].detach()))
    assert int((found == 0).sum()) == 12


# --- Taylor ------------------------------------------------------------------------------------


def test_a_taylor_score_is_the_mean_change_by_small_noise_at_the_input():
    net = subject(chain, (values(24, 16), values(12, 24)), 5, 16, calls=1)
    task = task_of(net)
    at = linearize(task.replay, net.calls[0])
    directions = [z[0].double() for z in probes(task, at.outputs)]
    generator = torch.Generator().manual_seed(0)
    found = changes(task, at)
    for here in reached(task, net.calls[0], lambda unit: True):
        node, (x, w, *_), _ = at.operands[here.site]
        seen = []
        for _ in range(300):
            noise = x.square().mean().sqrt() * torch.randn(x.shape, generator=generator)
            env = {**here.env, here.node: node.target(x + 1e-3 * noise, w)}
            y = task.replay.finish(env, here.rest, {})[0]
            moved = (y - at.outputs[0].detach()).double() / 1e-3
            seen += [float((z * moved).sum().abs()) for z in directions]
        assert found[here.site] == pytest.approx(sum(seen) / len(seen), rel=0.08)


def test_a_score_of_a_choice_is_the_square_of_the_change_times_its_relative_error():
    net = subject(branches, (values(12, 16), 3 * values(12, 16), values(8, 16)), 5, 16, calls=1)
    task = task_of(net)
    table, local = (METRICS[name](task) for name in ("taylor", "local_error"))
    found = changes(task, linearize(task.replay, net.calls[0]))
    powers = {name: change**2 * local.values[name, INT4.name] for name, change in found.items()}
    ratios = [table.values[name, INT4.name] / power for name, power in powers.items()]
    assert ratios == pytest.approx([ratios[0]] * 3)


def test_a_taylor_score_does_not_change_with_the_scale_between_two_layers():
    up, down = values(24, 16), values(12, 24)

    def of(scale: float) -> list[float]:
        net = subject(
            lambda x, up, down: (functional.linear(functional.linear(x, up), down),),
            (scale * up, down / scale),
            5,
            16,
            calls=1,
        )
        return [*changes(task_of(net), linearize(net.replay(), net.calls[0])).values()]

    assert of(100.0) == pytest.approx(of(1.0), rel=1e-3)


# --- noise in place of inputs ------------------------------------------------------------------


def drawn(x: torch.Tensor) -> torch.Tensor:
    return synthetic(x, torch.Generator().manual_seed(0))


def test_a_synthetic_input_has_the_scale_of_the_recorded_one_and_none_of_its_values():
    x = 3.0 + 0.5 * values(50, 40)
    found = drawn(x)
    assert found.shape == x.shape
    assert float(found.mean()) == pytest.approx(3.0, abs=0.05)
    assert float(found.std()) == pytest.approx(0.5, rel=0.05)
    assert float(torch.corrcoef(torch.stack([x.reshape(-1), found.reshape(-1)]))[0, 1]) < 0.1
    assert torch.equal(found, drawn(x.flip(0)))
    assert drawn(x.bfloat16()).dtype == torch.bfloat16


def test_a_synthetic_index_is_one_that_was_seen_or_lies_between():
    ids = torch.randint(5, 90, (8, 32), generator=torch.Generator().manual_seed(1))
    found = drawn(ids)
    assert found.dtype == ids.dtype
    assert int(ids.min()) <= int(found.min()) < int(found.max()) <= int(ids.max())
    assert not torch.equal(found, ids)


@pytest.mark.parametrize(
    "given",
    [
        torch.tensor([[1, 1, 0], [1, 0, 0]]),
        torch.tensor([True, False]),
        torch.tensor([0.0, float("-inf")]),
        torch.full((3,), 7.0),
        torch.zeros(0),
        torch.randn(4, dtype=torch.complex64),
        3,
        None,
    ],
)
def test_masks_constants_and_what_is_no_number_stay(given):
    assert drawn(given) is given


def test_a_masked_score_does_not_look_at_the_data():
    net = subject(chain, (values(24, 16), values(12, 24)), 5, 16)
    task = task_of(net)
    shuffled = [(call[0].flip(0, 1), *call[1:]) for call in net.calls]
    tables = [METRICS["masked"](replace(task, records=r)) for r in (task.records, shuffled)]
    scores = [[v / t.provenance["kappa"] for v in t.values.values()] for t in tables]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)
    assert METRICS["kl"](task).values != METRICS["kl"](replace(task, records=shuffled)).values
