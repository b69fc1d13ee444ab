"""Laws of every metric, and the cards' planted cases: pairs, traces, divergences, ranks."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from mpq_fx.facts import Choice
from mpq_fx.numerics import noise_power
from mpq_fx.passes import METRICS
from mpq_fx.passes.analyze import linearize
from mpq_fx.passes.analyze.metric import Task
from mpq_fx.passes.analyze.metrics import auto as auto_module
from mpq_fx.passes.analyze.metrics import fisher, hessian_trace, interlayer_hessian
from mpq_fx.passes.analyze.metrics.heavy_tail import hill, spectrum
from mpq_fx.passes.analyze.metrics.hessian_eigenvalue import eigenvalues, mean_and_deviation
from mpq_fx.passes.analyze.metrics.hessian_trace import mean_curvature
from mpq_fx.passes.analyze.metrics.interlayer_kl import divergence_rows
from mpq_fx.passes.analyze.metrics.kl_singles import divergence
from mpq_fx.passes.analyze.metrics.measured_pairs import block_of, measured_pairs, projected
from mpq_fx.passes.analyze.metrics.relevance import relevances
from mpq_fx.passes.analyze.ranking import agreement, draw, measured, predicted, spearman
from tests.architectures import values
from tests.passes.conftest import Subject, subject

FLOAT, INT8 = Choice("float32", "float32"), Choice("int8", "float32")
INT4, BF16 = Choice("int4", "float32"), Choice("bfloat16", "bfloat16")

CURVED = ("hessian_eigenvalue", "eigenvalue_spread", "perturbation_hessian", "relevance")
DISTURBED = ("pruning", "taylor", "masked")


def task_of(net: Subject, *choices: Choice, ties=()) -> Task:
    options = {site.name: (FLOAT, *choices) for site in net.sites}
    return Task(net.replay(), options, net.calls, ties, losses=losses_of(net))


def losses_of(net: Subject):
    """Of each call half the squared distance of the first output to the float one."""
    targets = [net.replay().run(call, {})[0] for call in net.calls]
    return [lambda outputs, y=y: (outputs[0] - y).square().sum() / 2 for y in targets]


def branches(x, first, second, third):
    return (
        functional.linear(x, first) + functional.linear(x, second) + functional.linear(x, third),
    )


def chain(x, up, down):
    return (functional.linear(functional.gelu(functional.linear(x, up)), down),)


def planted(*scales: float) -> Subject:
    """Three branches that are added; each is as loud as its scale."""
    weights = [scale * values(12, 16, k)[..., 0] for k, scale in enumerate(scales, 1)]
    return subject(branches, weights, 5, 16)


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_fills_its_table_and_float_hurts_nothing(net, name):
    task = task_of(net, INT8, INT4, BF16)
    table = METRICS[name](task)
    wanted = {(site, c.name) for site, kept in task.options.items() for c in kept}
    assert set(table.values) == wanted
    assert table.measure == "noise_power"
    assert all(math.isfinite(value) for value in table.values.values())
    assert all(table.values[site, FLOAT.name] == 0.0 for site in task.options)
    assert all(table.values[site, INT4.name] > 0.0 for site in task.options)
    assert set(table.provenance) >= {"records", "of", "seconds", "forward_passes", "estimated"}


@pytest.mark.parametrize("name", METRICS)
def test_fewer_bits_and_louder_branches_hurt_more(name):
    net = planted(4.0, 1.0, 0.25)
    table = METRICS[name](task_of(net, INT8, INT4))
    sites = [site.name for site in net.sites]
    assert all(table.values[s, INT4.name] > table.values[s, INT8.name] for s in sites)
    if name not in (
        "local_error",
        "heavy_tail",
        "canonical_correlation",
    ):  # which do not look at the outputs
        loud, middle, quiet = (table.values[s, INT4.name] for s in sites)
        assert loud > middle > quiet


@pytest.mark.parametrize("name", METRICS)
def test_a_tie_changes_together_and_shares_its_noise(name):
    net = planted(1.0, 1.0, 1.0)
    one, _, three = (site.name for site in net.sites)
    table = METRICS[name](task_of(net, INT4, ties=[(one, three)]))
    assert table.values[one, INT4.name] == table.values[three, INT4.name]
    assert not any(three in (u, v) for u, _, v, _ in table.pairs), "pairs stand at the first site"


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_gives_the_same_table_twice(net, name):
    first, second = (METRICS[name](task_of(net, INT8)) for _ in range(2))
    assert first.values == second.values
    assert first.pairs == second.pairs


@pytest.mark.parametrize("name", METRICS)
def test_calls_in_inference_mode_are_measured_like_others(net, name):
    with torch.inference_mode():
        calls = tuple(tuple(x.clone() for x in call) for call in net.calls)
    table = METRICS[name](replace(task_of(net, INT8), records=calls))
    wanted = METRICS[name](task_of(net, INT8))
    assert table.values == pytest.approx(wanted.values)


# --- pairs -------------------------------------------------------------------------------------


def test_with_two_units_measured_pairs_know_every_plan():
    net = subject(chain, (values(24, 16), values(12, 24)), 5, 16, calls=2)
    task = task_of(net, INT8, INT4)
    table = METRICS["measured_pairs"](task)
    for choices in itertools.product((FLOAT, INT8, INT4), repeat=2):
        plan = dict(zip(task.options, choices, strict=True))
        replay = net.replay()
        noise = [noise_power(replay.run(c, plan)[0], replay.run(c, {})[0]) for c in net.calls]
        assert predicted(table, plan) ** 2 == pytest.approx(sum(noise) / 2, rel=1e-3)


def test_where_errors_add_up_measured_pairs_are_those_of_the_hessian(monkeypatch):
    monkeypatch.setattr(interlayer_hessian, "SIGNIFICANT", 0.0)
    task = task_of(planted(1.0, 1.0, 1.0), INT8, INT4)
    wanted = METRICS["interlayer_hessian"](task)
    found = METRICS["measured_pairs"](task)
    assert found.values == pytest.approx(wanted.values, rel=1e-4)
    for pair, value in wanted.pairs.items():
        scale = (wanted.values[pair[:2]] * wanted.values[pair[2:]]) ** 0.5
        assert found.pairs[pair] == pytest.approx(value, abs=1e-3 * scale)


def test_a_projection_has_no_negative_eigenvalue_and_leaves_others_alone():
    task = task_of(planted(1.0, 1.0, 1.0), INT8, INT4)
    table = measured_pairs(task)
    kept = projected(task, table)
    assert kept.values == pytest.approx(table.values, rel=1e-3, abs=1e-12)
    one, two, _ = task.options
    bad = {**table.pairs, (one, INT4.name, two, INT4.name): -10 * table.values[one, INT4.name]}
    mended = projected(task, type(table)(**{**vars(table), "pairs": bad}))
    plan = {one: INT4, two: INT4}
    assert (
        sum(mended.values[s, INT4.name] for s in plan)
        + mended.pairs[one, INT4.name, two, INT4.name]
        >= -1e-12
    )


def test_block_pairs_are_the_pairs_of_neighbors():
    assert block_of(("encoder.layer.3.attention.query",)) == "encoder.layer.3"
    assert block_of(("layer.10",)) == "layer.10"
    assert block_of(("head.out",)) == "head"


# --- gradients ---------------------------------------------------------------------------------


def test_with_many_directions_fisher_is_the_hessian_of_the_replays(monkeypatch):
    monkeypatch.setattr(interlayer_hessian, "SIGNIFICANT", 0.0)
    monkeypatch.setattr(fisher, "probes", lambda task, y: linearize.probes(task, y, 400))
    task = task_of(planted(1.0, 1.0, 1.0), INT4)
    wanted, found = (METRICS[name](task) for name in ("interlayer_hessian", "fisher"))
    for key, value in wanted.values.items():
        assert found.values[key] == pytest.approx(value, rel=0.15)
    for pair, value in wanted.pairs.items():
        assert found.pairs[pair] == pytest.approx(value, abs=0.15 * max(wanted.values.values()))


def test_a_trace_is_that_of_the_hessian(monkeypatch):
    """J Jᵀ = [[2, 1], [1, 3]]: a walk back tells 3 or 7, and 5 in the mean."""
    factor = torch.linalg.cholesky(torch.tensor([[2.0, 1.0], [1.0, 3.0]]))
    net = subject(lambda x, w: (functional.linear(x, w),), (factor,), 1, 2, calls=1)
    monkeypatch.setattr(hessian_trace, "MOST", 500)
    monkeypatch.setattr(hessian_trace, "TOLERANCE", 0.0)
    task = task_of(net, INT8)
    at = linearize.linearize(task.replay, net.calls[0])
    norm = float(at.outputs[0].detach().double().square().sum())
    site = net.sites[0].name
    seen = Counter()
    for z in linearize.probes(task, at.outputs, 500):
        g = linearize.pull_back(at, z)[site] @ factor  # by x
        seen[round(float(g.square().sum()) * norm, 3)] += 1
    assert set(seen) == {3.0, 7.0}
    trace = mean_curvature(task, at)[site, "activation"] * 2 * norm
    assert trace == pytest.approx(5.0, abs=3 * (4 / 500) ** 0.5)


def test_a_layer_that_nothing_reads_on_has_no_curvature():
    def muted(x, one, two):
        return (functional.linear(x, one) + 0.0 * functional.linear(x, two),)

    net = subject(muted, (values(12, 16), values(12, 16)), 5, 16)
    loud, mute = (site.name for site in net.sites)
    forward = ("measured", "kl", "fisher", "hessian_trace", "first_order", "fisher_elementwise")
    for name in (*forward, *CURVED, *DISTURBED):
        table = METRICS[name](task_of(net, INT4))
        assert table.values[mute, INT4.name] <= 1e-12 < table.values[loud, INT4.name], name


def test_a_push_forward_is_the_derivative():
    net = subject(chain, (values(24, 16), values(12, 24)), 5, 16, calls=1)
    task = task_of(net, INT8)
    for here in linearize.reached(task, net.calls[0], lambda unit: True):
        direction = values(*here.y.shape)
        y = here.y.detach().requires_grad_()
        outputs = task.replay.finish({**here.env, here.node: y}, here.rest, {})
        found = linearize.push_forward(task.replay, here, direction)
        z = torch.ones_like(outputs[0])
        (gradient,) = torch.autograd.grad(outputs[0], y, z)
        wanted = float((gradient * direction).double().sum())
        assert float(found[0].sum()) == pytest.approx(wanted, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("name", METRICS)
def test_without_time_a_metric_measures_one_unit_of_each_kind(name):
    net = planted(1.0, 1.0, 1.0)
    task = replace(task_of(net, INT8, INT4), deadline=0.0)
    table = METRICS[name](task)
    assert table.provenance["records"] == 1
    assert table.provenance["estimated"] == sorted(site.name for site in net.sites[1:])
    assert all(table.values[site.name, INT4.name] > 0.0 for site in net.sites)


def test_an_eigenvalue_is_the_largest_of_the_hessian():
    """The Hessian by the activation is Wᵀ W / ‖y‖², by the weight xᵀ x / ‖y‖²."""
    w = torch.diag(torch.tensor([5.0, 2.0, 1.0]))
    net = subject(lambda x, w: (functional.linear(x, w),), (w,), 1, 3, calls=1)
    task = task_of(net, INT8)
    at = linearize.linearize(task.replay, net.calls[0])
    (x, _), site = net.calls[0], net.sites[0].name
    found = eigenvalues(task, net.calls[0], at, lambda unit: True)
    power = float((x @ w.T).square().sum())
    assert found[site, "activation"] == pytest.approx(25.0 / power, rel=1e-3)
    assert found[site, "weight"] == pytest.approx(float(x.square().sum()) / power, rel=1e-3)


def test_unstable_is_sensitive():
    assert mean_and_deviation([1.0, 9.0]) == 9.0
    assert mean_and_deviation([5.0, 5.0]) == 5.0


def test_row_sums_rank_elements_by_their_curvature():
    """L = ½ Σ a_i o_i² has the row sums a."""
    scales = torch.tensor([4.0, 1.0, 2.0, 0.5])
    net = subject(
        lambda x, w, a: (functional.linear(x, w) * a,), (values(4, 3), scales), 5, 3, calls=1
    )
    task = task_of(net, INT8)
    at = linearize.linearize(task.replay, net.calls[0])
    (here,) = linearize.reached(task, net.calls[0], lambda unit: True)
    moved = linearize.push_forward(task.replay, here, torch.ones_like(here.y))
    cotangents = linearize.relative_cotangents(task, at, moved)
    found = linearize.pull_back(at, cotangents, [here.site])[here.site]
    norm = float(at.outputs[0].detach().double().square().sum())
    assert found * norm == pytest.approx((scales**2).expand(5, 4).numpy(), rel=1e-3)


def test_relevance_is_conserved_from_layer_to_layer():
    def rectified(x, one, two, three):
        y = functional.linear(x, one).relu()
        return (functional.linear(functional.linear(y, two).relu(), three),)

    weights = (values(16, 8), values(12, 16), values(6, 12))
    net = subject(rectified, weights, 5, 8, calls=1)
    task = task_of(net, INT8)
    at = linearize.linearize(task.replay, net.calls[0])
    logits = float(at.outputs[0].detach().double().amax(-1).sum())
    found = relevances(task, at)
    assert len(found) == 3
    for passed in found.values():
        assert float(passed.sum()) == pytest.approx(logits, rel=1e-4)


@pytest.mark.parametrize(
    ("alpha", "count", "wanted"),
    [
        (2, 1000, 1.998476),
        (3, 1000, 2.996953),
        (5, 1000, 4.993905),
        (2, 128, 1.987918),
        (3, 128, 2.975834),
        (5, 128, 4.951671),
    ],
)
def test_the_tail_of_a_pareto_law_is_found(alpha, count, wanted):
    places = (torch.arange(1, count + 1, dtype=torch.float64) - 0.5) / count
    levels = places ** (-1 / (alpha - 1))
    assert hill(levels) == pytest.approx(wanted, abs=2e-6)
    assert hill(100 * levels.flip(0)) == pytest.approx(wanted, abs=2e-6)


def test_a_spectrum_is_that_of_the_tiles():
    w = values(256, 128)
    found = spectrum(w)
    halves = [torch.linalg.svdvals(half.double()).square() for half in w.split(128)]
    assert found.sort().values.numpy() == pytest.approx(torch.cat(halves).sort().values.numpy())
    shuffled = torch.cat([w[:128].flip(0), w[128:]])
    assert hill(spectrum(shuffled)) == pytest.approx(hill(found))
    assert len(spectrum(values(20, 30))) == 20


# --- divergence --------------------------------------------------------------------------------


def test_a_divergence_is_that_of_softmax_and_never_negative():
    one, two = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0)).unbind()
    p, q = one.softmax(-1), two.softmax(-1)
    wanted = float((p * (p / q).log()).sum(-1).mean())
    assert divergence([two], [one], frozenset()) == pytest.approx(wanted, rel=1e-5)
    assert divergence([one], [one], frozenset()) == 0.0
    assert divergence([two], [one], frozenset({0})) == 0.0
    assert divergence([one + 3.0], [one], frozenset()) == pytest.approx(0.0, abs=1e-12)


def test_half_of_a_square_is_the_divergence_of_small_errors_alone_and_together():
    source = torch.Generator().manual_seed(0)
    y, one, two = torch.randn(3, 7, 5, generator=source).unbind()
    nothing = frozenset[int]()
    rows = [divergence_rows([y + 1e-2 * e], [y], nothing) for e in (one, two)]
    for row, error in zip(rows, (one, two), strict=True):
        wanted = divergence([y + 1e-2 * error], [y], nothing)
        assert float(row.square().sum()) / 2 == pytest.approx(wanted, rel=2e-2)
    both = divergence([y + 1e-2 * (one + two)], [y], nothing)
    assert float((rows[0] + rows[1]).square().sum()) / 2 == pytest.approx(both, rel=2e-2)
    assert float(divergence_rows([y + 3.0], [y], nothing).abs().max()) < 1e-6


# --- ranks -------------------------------------------------------------------------------------


def test_ranks_are_shared_by_equal_values():
    assert spearman([1, 2, 3], [10, 20, 30]) == pytest.approx(1.0)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(np.sqrt(0.9))
    assert math.isnan(spearman([1, 1], [1, 2]))


def test_random_plans_are_the_same_again_and_keep_ties(net):
    task = task_of(net, INT8, INT4)
    plans = [draw(task, seed) for seed in range(20)]
    assert plans == [draw(task, seed) for seed in range(20)]
    assert {len(plan) for plan in plans} == {0, 1, 2}
    tied = task_of(net, INT8, ties=[tuple(task.options)])
    assert {len(draw(tied, seed)) for seed in range(20)} == {0, 2}


def test_agreement_of_a_table_with_what_is_measured(net):
    task = task_of(net, INT8, INT4)
    plans = [draw(task, seed) for seed in range(12)]
    found = agreement(METRICS["measured_pairs"](task), plans, measured(task, plans))
    assert found.rank > 0.9
    low, middle, high = found.ratios
    assert 0.9 < low <= middle <= high < 1.1


def test_auto_takes_pairs_only_where_they_rank_plans_better(monkeypatch):
    task = task_of(planted(1.0, -1.0, 1.0), INT8, INT4)
    monkeypatch.setattr(interlayer_hessian, "SIGNIFICANT", 0.0)
    table = METRICS["auto"](task)
    names = {"measured_singles", "interlayer_hessian", "block_pairs"}
    assert set(table.provenance["compared"]) == names
    assert {table.metric, *(other.metric for other in table.others)} == names
    monkeypatch.setattr(auto_module, "WORTH", 2.0)
    alone = METRICS["auto"](task)
    assert (alone.metric, alone.pairs) == ("measured_singles", {})
    monkeypatch.setattr(auto_module, "WORTH", -2.0)
    assert METRICS["auto"](task).pairs


def test_auto_measures_pairs_of_blocks_only_where_there_is_time(monkeypatch):
    task = task_of(planted(1.0, -1.0, 1.0), INT8, INT4)
    monkeypatch.setattr(auto_module, "passes_of_blocks", lambda task: 1e9)
    hurried = METRICS["auto"](replace(task, deadline=time.monotonic() + 60.0))
    assert "block_pairs" not in {hurried.metric, *(other.metric for other in hurried.others)}
    at_leisure = METRICS["auto"](task)
    assert "block_pairs" in {at_leisure.metric, *(other.metric for other in at_leisure.others)}
    more = at_leisure.provenance["forward_passes"] - hurried.provenance["forward_passes"]
    assert more >= METRICS["block_pairs"](task).provenance["forward_passes"]
