"""Pair terms of the error table: exact where errors add up, Hessian products where they do not."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional

import mpq_fx
from mpq_fx.facts import Choice
from mpq_fx.formats import format_named
from mpq_fx.numerics import fake_quantize, noise_power
from mpq_fx.passes.analyze.metric import Task
from mpq_fx.passes.analyze.metrics import interlayer_hessian as module
from mpq_fx.passes.analyze.metrics.interlayer_hessian import interlayer_hessian, pairs_of, sketch
from mpq_fx.passes.analyze.metrics.measured_singles import measured_singles
from tests.architectures import values
from tests.passes.conftest import Subject, subject

FLOAT, INT8 = Choice("float32", "float32"), Choice("int8", "float32")
INT4 = Choice("int4", "float32")


def branches(x, first, second, third):
    return (
        functional.linear(x, first) + functional.linear(x, second) + functional.linear(x, third),
    )


def chain(x, up, down):
    return (functional.linear(functional.gelu(functional.linear(x, up)), down),)


@pytest.fixture
def every_pair(monkeypatch) -> None:
    monkeypatch.setattr(module, "SIGNIFICANT", 0.0)


def table_of(net: Subject, *choices: Choice, ties=()):
    options = {site.name: (FLOAT, *choices) for site in net.sites}
    return interlayer_hessian(Task(net.replay(), options, net.calls, ties=ties))


def predicted(table, plan: dict[str, Choice]) -> float:
    """Σ values + Σ pairs of a plan, sites that are not in it in float."""
    names = {(site, choice.name) for site, choice in plan.items()}
    alone = sum(table.values[key] for key in names)
    return alone + sum(t for (u, c, v, d), t in table.pairs.items() if {(u, c), (v, d)} <= names)


def measured(net: Subject, plan: dict[str, Choice]) -> float:
    replay = net.replay()
    noise = [noise_power(replay.run(c, plan)[0], replay.run(c, {})[0]) for c in net.calls]
    return sum(noise) / len(noise)


def planted(second: torch.Tensor | None = None) -> Subject:
    """Three weights of one shape; the second is the test's own."""
    one, two, three = (values(12, 16, k)[..., 0] for k in (1, 2, 3))
    return subject(branches, (one, two if second is None else second, three), 5, 16)


def test_where_errors_add_up_the_noise_of_every_plan_is_exact(every_pair):
    net = planted()
    table = table_of(net, INT8, INT4)
    for choices in itertools.product((FLOAT, INT8, INT4), repeat=3):
        sites = zip((s.name for s in net.sites), choices, strict=True)
        plan = {site: choice for site, choice in sites if choice is not FLOAT}
        assert predicted(table, plan) == pytest.approx(measured(net, plan), rel=1e-4)


@pytest.mark.parametrize(("sign", "joint"), [(1.0, 4.0), (-1.0, 0.0)], ids=["amplify", "cancel"])
def test_a_planted_pair_is_found(every_pair, sign, joint):
    """Two equal errors make four times the noise of one; two opposite ones none."""
    net = planted(sign * values(12, 16, 1)[..., 0])
    one, two, _ = (site.name for site in net.sites)
    table = table_of(net, INT4)
    alone = predicted(table, {one: INT4})
    assert predicted(table, {one: INT4, two: INT4}) == pytest.approx(
        joint * alone, abs=1e-4 * alone
    )


def test_a_pair_is_the_cross_term_of_the_hessian(every_pair):
    """D_vᵀ H D_u of ½ ‖y − y_float‖² / ‖y_float‖², by autograd in float64."""
    up, down = values(2, 16), values(1, 2)  # few outputs, so that errors meet
    net = subject(chain, (up, down), 5, 16, calls=1)
    x = net.calls[0][0].double()
    weights = (up.double(), down.double())
    y = chain(x, *weights)[0]

    def loss(*w):
        return 0.5 * (chain(x, *w)[0] - y).square().sum() / y.square().sum()

    moved = [fake_quantize(w, format_named("int8")).double() - w.double() for w in (up, down)]
    zero = [torch.zeros_like(d) for d in moved]
    _, (_, product) = torch.autograd.functional.hvp(loss, weights, (moved[0], zero[1]))
    wanted = 2 * float((product * moved[1]).sum())  # the noise power is twice the loss
    ((_, found),) = table_of(net, INT8).pairs.items()
    assert found == pytest.approx(wanted, rel=0.05)


def test_the_singles_are_those_of_the_default_metric():
    net = planted()
    options = {site.name: (FLOAT, INT8, INT4) for site in net.sites}
    singles = measured_singles(Task(net.replay(), options, net.calls))
    table = interlayer_hessian(Task(net.replay(), options, net.calls))
    assert table.values.keys() == singles.values.keys()
    for key, value in singles.values.items():
        assert table.values[key] == pytest.approx(value, rel=1e-4)
    assert table.provenance["forward_passes"] == singles.provenance["forward_passes"]


def test_a_tie_is_one_unit(every_pair):
    net = planted()
    one, two, three = (site.name for site in net.sites)
    table = table_of(net, INT4, ties=[(one, three)])
    assert {(u, v) for u, _, v, _ in table.pairs} == {(one, two)}
    plan = dict.fromkeys((one, two, three), INT4)
    assert predicted(table, plan) == pytest.approx(measured(net, plan), rel=1e-4)


def test_unrelated_noise_has_no_pairs():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 4096, generator=generator).double()
    rows[1] += 0.2 * rows[0]
    keys = [(f"u{k}", "int8") for k in range(40)]
    pairs = pairs_of(rows @ rows.T, keys, 4096)
    assert pairs["u0", "int8", "u1", "int8"] > 0
    assert len(pairs) <= 8  # 780 pairs, of which chance keeps 0.27 %


def test_a_sketch_keeps_inner_products():
    a, b = torch.randn(2, 3 * module.WIDTH, generator=torch.Generator().manual_seed(0))
    b = b + 0.5 * a
    off = float(sketch(a) @ sketch(b) - a @ b)
    assert abs(off) <= 4 * float(a.norm() * b.norm()) / module.WIDTH**0.5
    assert sketch(a).shape == (module.WIDTH,)
    assert torch.equal(sketch(a), sketch(a.clone()))
    assert torch.equal(sketch(a[:5]), a[:5])


def test_it_plans_a_model(isolated):
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32))
    config = mpq_fx.Config(target="reference", tolerance=0.02, sensitivity="interlayer_hessian")
    batches = [torch.randn(4, 32) for _ in range(4)]
    plan = mpq_fx.tune(model.eval(), batches, config=config, progress=False)
    assert plan.tables["error"].metric == "interlayer_hessian"
    assert plan.errors[plan.winner] <= 0.02
