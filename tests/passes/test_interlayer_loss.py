"""A loss at the outputs: exact where it is quadratic, signed, refused where it tells nothing."""

from __future__ import annotations

import itertools
from dataclasses import replace

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch.nn import functional

from mpq_fx.errors import CalibrationError, ConfigError, UnsupportedError
from mpq_fx.facts import Choice
from mpq_fx.passes import METRICS
from mpq_fx.passes.allocate import SOLVERS
from mpq_fx.passes.allocate.ordered import incremental_order
from mpq_fx.passes.allocate.problem import Problem
from mpq_fx.passes.analyze.metric import Task
from mpq_fx.passes.analyze.metrics import interlayer_hessian, interlayer_loss
from mpq_fx.passes.analyze.metrics.interlayer_hessian import WIDTH, sketch
from mpq_fx.passes.analyze.metrics.interlayer_loss import balance, expand
from mpq_fx.passes.analyze.ranking import power
from tests.architectures import values
from tests.passes.conftest import Subject, subject

FLOAT, INT8 = Choice("float32", "float32"), Choice("int8", "float32")
INT4 = Choice("int4", "float32")
METRIC = METRICS["interlayer_loss"]


def branches(x, first, second, third):
    return (
        functional.linear(x, first) + functional.linear(x, second) + functional.linear(x, third),
    )


def planted(second: torch.Tensor | None = None, third: float = 1.0, calls: int = 2) -> Subject:
    """Three branches that are added, so that errors add up exactly; the second is the test's."""
    one, two, three = (values(12, 16, k)[..., 0] for k in (1, 2, 3))
    weights = (one, two if second is None else second, third * three)
    return subject(branches, weights, 5, 16, calls=calls)


def quadratic(slope: float, definite: bool, seed: int = 0):
    """g, H of ⟨g, y⟩ + ½ yᵀ H y for the 12 numbers of each row"""
    source = torch.Generator().manual_seed(seed)
    g = slope * torch.randn(12, generator=source)
    a = torch.randn(12, 12, generator=source)
    return g, a @ a.T if definite else a + a.T


def task_of(net: Subject, losses, *choices: Choice, ties=()) -> Task:
    options = {site.name: (FLOAT, *choices) for site in net.sites}
    return Task(net.replay(), options, net.calls, ties, losses=losses)


@pytest.fixture
def raw(monkeypatch):
    """Every pair, and rises in the unit of the loss."""
    monkeypatch.setattr(interlayer_hessian, "SIGNIFICANT", 0.0)
    monkeypatch.setattr(interlayer_loss, "scaled", lambda task, table: table)


def rise(task: Task, plan) -> float:
    """The true one, in float64: what replays say."""
    found = []
    for record, loss in zip(task.records, task.losses, strict=True):
        ends = (task.replay.run(record, choices)[0].double() for choices in (plan, {}))
        found.append(float(torch.sub(*(loss([y]) for y in ends))))
    return sum(found) / len(found)


def losses_of(net: Subject, g, h):
    """Around the float output of each call, so that the slope there is g; also in float64."""
    targets = [net.replay().run(call, {})[0] for call in net.calls]

    def loss(outputs, y):
        e = outputs[0] - y.to(outputs[0])
        return (e @ g.to(e)).sum() + (e * (e @ h.to(e))).sum() / 2

    return [lambda outputs, y=y: loss(outputs, y) for y in targets]


@pytest.mark.parametrize("definite", [True, False], ids=["convex", "saddle"])
@pytest.mark.parametrize("slope", [0.0, 3.0], ids=["at a minimum", "on a slope"])
def test_of_a_quadratic_loss_every_plan_is_exact(raw, definite, slope):
    net = planted()
    g, h = quadratic(slope, definite)
    task = task_of(net, losses_of(net, g, h), INT8, INT4)
    table = METRIC(task)
    largest = max(map(abs, table.values.values()))
    for choices in itertools.product((FLOAT, INT8, INT4), repeat=3):
        sites = zip(task.options, choices, strict=True)
        plan = {site: choice for site, choice in sites if choice is not FLOAT}
        assert power(table, plan) == pytest.approx(rise(task, plan), abs=1e-5 * largest)


def test_terms_are_those_of_the_closed_form(raw):
    """A[u, u] = ⟨g, e_u⟩ + ½ e_uᵀ H e_u,  A[u, v] = e_uᵀ H e_v, by hand in float64."""
    net = planted()
    g, h = quadratic(2.0, definite=False)
    task = task_of(net, losses_of(net, g, h), INT8, INT4)
    table = METRIC(task)
    errors = {}
    for site, choice in itertools.product(task.options, (INT8, INT4)):
        ends = [
            [net.replay().run(c, p)[0].double() for c in net.calls] for p in ({site: choice}, {})
        ]
        errors[site, choice.name] = torch.stack(ends[0]) - torch.stack(ends[1])
    g, h = g.double(), h.double()
    for key, e in errors.items():
        wanted = float((e @ g).sum() + (e * (e @ h)).sum() / 2) / len(net.calls)
        assert table.values[key] == pytest.approx(wanted, rel=1e-5)
    scale = max(map(abs, table.pairs.values()))
    assert len(table.pairs) == 3 * 2 * 2
    for (u, c, v, d), found in table.pairs.items():
        wanted = float((errors[u, c] * (errors[v, d] @ h)).sum()) / len(net.calls)
        assert found == pytest.approx(wanted, abs=1e-5 * scale)


def square(net: Subject):
    return losses_of(net, torch.zeros(12), torch.eye(12))


def order_of(task: Task, table) -> list[int]:
    """The incremental order of the units in int4, as numbers of the sites."""
    sites = [*task.options]
    alone = {s: table.values[s, INT4.name] for s in sites}
    pairs = {(u, v): term for (u, _, v, _), term in table.pairs.items()}
    return [sites.index(s) + 1 for s in incremental_order(sites, alone, pairs)]


def loudness(net: Subject) -> float:
    """By how much the third branch must be scaled for 1.5 times the single of the first."""
    table = METRIC(task_of(net, square(net), INT4))
    one, _, three = (table.values[site.name, INT4.name] for site in net.sites)
    return (1.5 * one / three) ** 0.5


@pytest.mark.parametrize(
    ("sign", "joint", "place"), [(1.0, 4.0, 1), (-1.0, 0.0, 2)], ids=["amplifying", "canceling"]
)
def test_a_planted_pair_changes_the_order_and_what_a_solver_takes(raw, sign, joint, place):
    """Singles 1, 1, 1.5; the first two are four times, or nothing, together.

    `place` is where the third stands in the order, behind none of the equal two or behind both.
    """
    first = values(12, 16, 1)[..., 0]
    third = loudness(planted(sign * first))
    net = planted(sign * first, third)
    task = task_of(net, square(net), INT4)
    table = METRIC(task)
    one, two, three = task.options
    unit = table.values[one, INT4.name]
    assert table.values[three, INT4.name] == pytest.approx(1.5 * unit, rel=1e-3)
    both = power(table, {one: INT4, two: INT4})
    assert both == pytest.approx(joint * unit, abs=1e-5 * unit)
    paired = replace(table, pairs={k: p for k, p in table.pairs.items() if three not in k})
    singles = replace(table, pairs={})
    assert order_of(task, paired).index(3) == place
    assert order_of(task, singles).index(3) == 2
    assert (3 in low_units(task, paired)) == (joint > 2.5)
    assert 3 not in low_units(task, singles), "which predicts 2, and gets 4 where errors add up"


def low_units(task: Task, table) -> set[int]:
    """Two of three have to be in int4: which does CP-SAT take?"""
    sites = [*task.options]
    bits = {(s, o.name): 4.0 if o is INT4 else 32.0 for s in sites for o in task.options[s]}
    problem = Problem(
        options={s: tuple(o.name for o in kept) for s, kept in task.options.items()},
        error=dict(table.values),
        pairs=dict(table.pairs),
        resources={"bits": bits},
        budgets={"bits": 40.0},
        objective=("error",),
    )
    found = [SOLVERS[name](problem).assignment for name in ("cp_sat", "brute_force")]
    assert table_value(table, found[0]) == pytest.approx(table_value(table, found[1]))
    return {k for k, s in enumerate(sites, 1) if found[0][s] == INT4.name}


def table_value(table, assignment) -> float:
    plan = {s: (INT4 if name == INT4.name else FLOAT) for s, name in assignment.items()}
    return power(table, plan)


def test_errors_that_never_meet_have_no_pairs_and_the_order_of_singles(raw):
    def apart(x, one, two, three):
        return tuple(functional.linear(x, w) for w in (one, two, three))

    weights = [scale * values(12, 16, k)[..., 0] for k, scale in enumerate((2.0, 1.0, 3.0), 1)]
    net = subject(apart, weights, 5, 16)
    targets = [net.replay().run(call, {}) for call in net.calls]

    def distance(outputs, ys):
        return sum((a - b).square().sum() for a, b in zip(outputs, ys, strict=True))

    losses = [lambda outputs, ys=ys: distance(outputs, ys) for ys in targets]
    task = task_of(net, losses, INT4)
    table = METRIC(task)
    assert table.pairs == {}
    assert order_of(task, table) == [2, 1, 3]


def test_a_divergence_from_the_float_model_is_never_negative(raw):
    """Card A3, test 6: its gradient is zero there, its Hessian has no negative eigenvalue."""
    net = planted()
    targets = [net.replay().run(call, {})[0].log_softmax(-1) for call in net.calls]

    def divergence(outputs, y):
        got = outputs[0].log_softmax(-1)
        return functional.kl_div(got, y.to(got), reduction="sum", log_target=True)

    losses = [lambda outputs, y=y: divergence(outputs, y) for y in targets]
    task = task_of(net, losses, INT8, INT4)
    table = METRIC(task)
    assert all(value >= 0.0 for value in table.values.values())
    small = dict.fromkeys(task.options, INT8)
    assert power(table, small) == pytest.approx(rise(task, small), rel=0.1)


def test_a_loss_that_is_linear_in_the_outputs_works_without_curvature(raw):
    net = planted()
    g, _ = quadratic(1.0, definite=True)
    task = task_of(net, losses_of(net, g, torch.zeros(12, 12)), INT8, INT4)
    plain = replace(task, losses=[lambda o: (o[0] @ g.to(o[0])).sum() for _ in net.calls])
    for table in (METRIC(task), METRIC(plain)):
        assert table.pairs == {}
        assert any(value < 0.0 for value in table.values.values()), "a loss may fall"
        for site in task.options:
            assert table.values[site, INT4.name] == pytest.approx(
                rise(task, {site: INT4}), rel=1e-4
            )


def test_an_output_that_the_loss_does_not_read_does_not_count(raw):
    def two(x, one, other):
        return functional.linear(x, one), functional.linear(x, other)

    net = subject(two, (values(12, 16), values(12, 16, 2)[..., 0]), 5, 16)
    task = task_of(net, [lambda o: o[0].square().sum() for _ in net.calls], INT4)
    table = METRIC(task)
    read, unread = task.options
    assert table.values[read, INT4.name] != 0.0
    assert table.values[unread, INT4.name] == 0.0


def test_a_tie_is_one_unit(raw):
    net = planted()
    one, two, three = (site.name for site in net.sites)
    task = task_of(net, square(net), INT4, ties=[(one, three)])
    table = METRIC(task)
    assert {(u, v) for u, _, v, _ in table.pairs} == {(one, two)}
    plan = dict.fromkeys((one, two, three), INT4)
    assert power(table, plan) == pytest.approx(rise(task, plan), rel=1e-4)


def test_the_noise_beside_the_rises_is_that_of_the_measured_singles():
    net = planted()
    task = task_of(net, losses_of(net, *quadratic(5.0, definite=False)), INT8, INT4)
    _, noise = METRIC.measure(task)
    assert noise.values == pytest.approx(METRICS["measured"](task).values)
    assert noise.pairs == {}


# --- scale --------------------------------------------------------------------------------------


def test_a_scaled_table_has_the_noise_of_plans_whatever_the_unit_of_the_loss():
    net = planted()
    tables = []
    for unit in (1.0, 1e6):
        losses = [lambda o, f=f, unit=unit: unit * f(o) for f in square(net)]
        tables.append(METRIC(task_of(net, losses, INT8, INT4)))
    assert tables[0].values == pytest.approx(tables[1].values, rel=1e-5)
    assert tables[0].provenance["kappa_from"] == "plans that raise the loss"
    assert tables[0].values == pytest.approx(
        METRICS["measured"](task_of(net, (), INT8, INT4)).values, rel=0.5
    )


def test_a_loss_that_only_falls_is_scaled_by_magnitudes():
    net = planted()
    risen = METRIC(task_of(net, square(net), INT8, INT4))
    falling = [lambda o, f=f: -f(o) for f in square(net)]
    table = METRIC(task_of(net, falling, INT8, INT4))
    assert table.provenance["kappa_from"] == "magnitudes"
    assert table.provenance["kappa"] > 0.0
    assert table.values == pytest.approx({key: -value for key, value in risen.values.items()})


# --- large outputs ------------------------------------------------------------------------------


@hypothesis.given(st.integers(0, 50))
@hypothesis.settings(max_examples=10)
def test_a_balanced_sketch_keeps_products_of_logits(seed):
    """Most of a vocabulary has no probability: errors are everywhere, H e is in a few places."""
    source = torch.Generator().manual_seed(seed)
    p = (6 * torch.randn(8 * WIDTH, generator=source)).softmax(-1)
    one, two = torch.randn(2, 8 * WIDTH, generator=source)
    two = two + 0.5 * one
    bent = p * (two - p @ two)
    scale = balance(two, bent)
    exact = float(one.double() @ bent.double())
    length = float((p * one * one).sum() * (p * two * two).sum()) ** 0.5
    off = abs(float(sketch(one * scale) @ sketch(bent / scale)) - exact)
    plain = abs(float(one.norm() * bent.norm()))
    assert float((one * scale).norm() * (bent / scale).norm()) < 0.5 * plain
    assert off <= 0.15 * length


def test_pairs_of_long_outputs_are_found_through_a_sketch(raw):
    """Two equal branches, and a loss that looks at few of 40,000 numbers."""
    w = values(8192, 16)
    net = subject(
        lambda x, a, b: (functional.linear(x, a) + functional.linear(x, b),), (w, w), 5, 16, calls=1
    )
    weight = (6 * torch.randn(8192, generator=torch.Generator().manual_seed(0))).softmax(-1)
    (y,) = net.replay().run(net.calls[0], {})
    task = task_of(net, [lambda o: ((o[0] - y).square() * weight).sum() / 2], INT4)
    table = METRIC(task)
    one, two = task.options
    assert y.numel() > WIDTH
    (pair,) = table.pairs.values()
    assert pair == pytest.approx(2 * table.values[one, INT4.name], rel=0.1)
    assert table.values[one, INT4.name] == pytest.approx(table.values[two, INT4.name])


# --- losses that tell nothing -------------------------------------------------------------------


def refused(loss, error, match):
    net = planted(calls=1)
    with pytest.raises(error, match=match):
        METRIC(task_of(net, [loss], INT8, INT4))


@pytest.mark.parametrize(
    "loss",
    [
        lambda o: torch.tensor(1.0),
        lambda o: o[0].detach().sum(),
        lambda o: o[0].argmax(-1).float().sum(),
        lambda o: torch.ones(3, requires_grad=True).sum(),
    ],
    ids=["constant", "detached", "argmax", "of something else"],
)
def test_a_loss_that_does_not_depend_on_the_output_is_refused(loss):
    refused(loss, ConfigError, "does not depend on the outputs")


@pytest.mark.parametrize(
    "loss",
    [
        lambda o: (o[0].abs() - 1e6).relu().sum(),
        lambda o: (0.0 * o[0]).sum(),
        lambda o: o[0].round().sum(),
    ],
    ids=["hinge", "times zero", "rounded"],
)
def test_a_flat_loss_is_refused(loss):
    refused(loss, CalibrationError, "the loss is flat")


def test_a_gradient_that_is_not_finite_is_refused():
    refused(lambda o: (o[0] - o[0].detach()).abs().sqrt().sum(), CalibrationError, "gradient")


def test_a_curvature_that_is_not_finite_is_refused():
    refused(lambda o: (o[0] - o[0].detach()).pow(1.5).sum(), CalibrationError, "curvature")


def test_a_loss_that_cannot_be_differentiated_twice_is_refused():
    lengths = torch.tensor([5]), torch.tensor([2])

    def ctc(outputs):
        letters = outputs[0].log_softmax(-1).unsqueeze(1)
        return functional.ctc_loss(letters, torch.tensor([[1, 2]]), *lengths)

    refused(ctc, UnsupportedError, "differentiated twice")


def test_without_a_loss_the_metric_says_how_to_give_one():
    with pytest.raises(ConfigError) as caught:
        METRIC(task_of(planted(), (), INT8))
    assert caught.value.fix == "mpq_fx.tune(model, batches, loss=f)"


def test_an_expansion_bends_by_the_hessian():
    y = values(6)
    at = expand(lambda o: o[0].pow(3).sum() + 2 * o[0].sum(), [y, 3, torch.arange(2)])
    assert [*at.leaves] == [0]
    e = {0: values(6, 2)[..., 0]}
    assert at.bend(e)[0].numpy() == pytest.approx((6 * y * e[0]).numpy(), rel=1e-5)
    wanted = float(((3 * y**2 + 2) * e[0] + 3 * y * e[0] ** 2).sum())
    assert at.rise(e, at.bend(e)) == pytest.approx(wanted, rel=1e-5)
