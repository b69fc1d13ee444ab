"""As accurate as bfloat16: the plan's measured error is at most that of `.bfloat16()`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import mpq_fx
from mpq_fx.numerics import relative_rms
from mpq_fx.report import report_of


@pytest.fixture(scope="module")
def digits():
    """(a net trained on scikit-learn's digits, images to calibrate on, others with their labels)"""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.data / 16.0).float()
    labels = torch.from_numpy(found.target).long()
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)
    )
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images[:1000]), labels[:1000]).backward()
        optimizer.step()
    return net.eval(), images[:1000].split(125), (images[1000:], labels[1000:])


@pytest.fixture(scope="module")
def plan(digits):
    net, batches, _ = digits
    return mpq_fx.tune(net, batches, config=mpq_fx.Config(target="reference"), progress=False)


def test_the_default_tolerance_is_the_measured_error_of_the_model_in_bfloat16(digits, plan):
    net, batches, _ = digits
    half = copy.deepcopy(net).bfloat16()
    with torch.no_grad():
        errors = [relative_rms(half(x.bfloat16()).float(), net(x)) for x in batches[4:6]]
    assert plan.tolerance == pytest.approx(max(errors), rel=1e-6)


def test_what_runs_stays_within_it_and_leaves_float(digits, plan):
    assert 0 < plan.errors["plan"] <= plan.tolerance
    assert all(row.choice != "float32" for row in plan.ledger)


def test_on_unseen_images_it_is_as_accurate_as_bfloat16(isolated, digits, plan):
    net, _, (images, labels) = digits
    half, compiled = copy.deepcopy(net).bfloat16(), mpq_fx.apply(net, plan)
    with torch.inference_mode():
        y, floats, halves = compiled(images), net(images), half(images.bfloat16()).float()
    assert 0 < relative_rms(y, floats) <= 1.1 * relative_rms(halves, floats)
    assert (y.argmax(1) == labels).float().mean() >= (
        halves.argmax(1) == labels
    ).float().mean() - 0.005


def test_a_tolerance_as_a_number_is_kept(digits):
    net, batches, _ = digits
    config = mpq_fx.Config(target="reference", tolerance=0.02)
    found = mpq_fx.tune(net, batches, config=config, progress=False)
    assert found.tolerance == 0.02
    assert found.errors["plan"] <= 0.02


def test_the_report_says_what_a_larger_error_would_buy(digits, plan):
    text = str(report_of([("graph 0", plan, "")]))
    assert "What more is possible" in text
    assert 'options={"tolerance": ' in text


def test_an_error_above_the_tolerance_on_the_report_calls_is_a_note(isolated, world):
    """The plan is chosen on some calls and reported on others; a difference is never hidden."""
    batches = [world.batch(k) for k in range(4)]
    config = world.config(tolerance=0.02, formats=["int8*uint8_tensor/static"])
    plan = mpq_fx.tune(world.Net().eval(), batches, config=config, progress=False)
    assert plan.error <= plan.tolerance
    assert not any("kept for the report" in note for note in plan.notes)
    batches[-1] = batches[-1] * 20  # far outside of the static ranges
    plan = mpq_fx.tune(world.Net().eval(), batches, config=config, progress=False)
    assert plan.errors["plan"] <= plan.tolerance < plan.error
    assert any("kept for the report" in note for note in plan.notes)
