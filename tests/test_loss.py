"""tune(loss=...): the user's own loss, from the batch it was given with to the plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import median

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.utils import ModelOutput

import mpq_fx
from mpq_fx.batch import inputs_of
from mpq_fx.demo.nets import CALLS, DIGITS, SUBJECTS, digits
from mpq_fx.facts import Table
from mpq_fx.numerics import relative_rms
from mpq_fx.passes import METRICS
from mpq_fx.passes.allocate.problem import NOISE
from mpq_fx.passes.analyze.metric import LossMetric, Task
from mpq_fx.passes.analyze.ranking import draw, power, spearman
from mpq_fx.plugins import add, forget
from mpq_fx.registry import bindings_of
from tests.losses import Net, batches, config, cross_entropy, tune

LOOKING_ON = []  # what the metric `seen` does with a task


def seen(task: Task) -> tuple[Table, Table]:
    LOOKING_ON[-1](task)
    table = METRICS["measured"](task)
    return table, table


seen_metric = LossMetric(seen)


@dataclass
class Output(ModelOutput):
    logits: torch.Tensor | None = None
    count: int | None = None


@pytest.fixture(scope="module", autouse=True)
def looking_on():
    add("metrics", "seen", f"{__name__}:seen_metric")
    yield
    forget()


def looked_on(model, given, loss, look) -> None:
    LOOKING_ON.append(look)
    tune(model, given, loss, sensitivity="seen")


# --- from a batch to a table --------------------------------------------------------------------


def test_it_plans_a_model_within_the_tolerance(isolated):
    model = Net()
    plan = tune(model, objective="size")
    assert plan.tables["error"].metric == "interlayer_loss"
    assert plan.tables[NOISE].metric == "measured_singles"
    assert plan.errors["plan"] <= 0.1
    assert any(choice.weight != "float32" for choice in plan.choices.values())
    assert bindings_of(model) == []


@pytest.mark.parametrize(
    ("pack", "logits"),
    [
        (lambda y: (y, 3), lambda o: o[0]),
        (lambda y: {"a": [y, None]}, lambda o: o["a"][0]),
        (lambda y: Output(logits=y, count=3), lambda o: o.logits),
    ],
    ids=["tuple", "nested", "ModelOutput"],
)
def test_an_output_may_have_any_structure(isolated, pack, logits):
    plain = tune(Net())
    found = tune(Net(pack), loss=lambda o, b: cross_entropy(logits(o), b))
    assert found.tables["error"].values == pytest.approx(plain.tables["error"].values, rel=1e-5)
    assert found.choices == plain.choices


def test_each_record_gets_the_loss_of_the_batch_that_it_came_from(isolated):
    """Some are repeated, and a constant one tells nothing: those are not recorded."""
    given = batches(*[6] * 12)
    zero = {"x": torch.zeros(6, 32), "labels": given[0]["labels"]}
    given = [given[0], given[1], given[1], zero, *given[2:8], given[3], *given[8:10], zero]
    given += batches(*[6] * 12)[10:]
    asked, model = [], Net().eval()

    def loss(output, batch):
        asked.append((output, batch))
        return cross_entropy(output, batch)

    def look(task):
        for record, of_outputs in zip(task.records, task.losses, strict=True):
            outputs = task.replay.run(record, {})
            found = of_outputs(outputs)
            output, batch = asked[-1]
            x = next(x for x in record if isinstance(x, torch.Tensor) and x.shape == (6, 32))
            assert torch.equal(batch["x"], x), "another batch's"
            assert batch is next(b for b in given if torch.equal(b["x"], x)), "not as it was given"
            assert output is outputs[0]
            assert float(found) == pytest.approx(float(cross_entropy(model(x), batch)), rel=1e-5)
        seen_records.append(len(task.records))

    seen_records = []
    looked_on(model, given, loss, look)
    assert seen_records == [3]


def test_a_smaller_last_batch_is_no_obstacle(isolated):
    """Dynamo answers every batch by its newest code, compiled for the last one's size."""
    plan = tune(Net(), batches(6, 6, 6, 6, 3))
    wanted = tune(Net(), batches(6, 6, 6, 6))
    assert plan.tables["error"].values == pytest.approx(wanted.tables["error"].values, rel=1e-4)


def test_what_the_forward_does_not_take_is_left_for_the_loss():
    net, x, y = Net(), torch.ones(2, 32), torch.zeros(2)
    assert inputs_of(net, {"x": x, "labels": y}) == {"x": x}
    assert inputs_of(net, {"x": x, "scale": y}) == {"x": x, "scale": y}
    assert inputs_of(net, (x, y, 3)) == (x, y)
    assert inputs_of(net, [x]) == [x]
    assert inputs_of(net, x) is x
    assert inputs_of(nn.Linear(2, 2), (x, y)) == (x,)
    anything = nn.Module()
    anything.forward = lambda *args, **kwargs: None
    assert inputs_of(anything, (x, y)) == (x, y)
    assert inputs_of(anything, {"q": x}) == {"q": x}


@torch.compiler.disable
def pooled_outside(y):
    return y.square().mean(0)


@pytest.mark.parametrize("how", ["disabled", "break"])
def test_the_users_code_behind_the_graph_is_differentiated_too(isolated, how):
    class Pooled(Net):
        def forward(self, x):
            y = super().forward(x)
            if how == "disabled":
                return pooled_outside(y)
            torch._dynamo.graph_break()  # noqa: TID251 -- what a user's print() does
            return y.square().mean(0)

    found = tune(Pooled(), loss=lambda o, b: o.sum()).tables["error"]
    wanted = tune(Net(), loss=lambda o, b: o.square().mean(0).sum()).tables["error"]
    assert found.values == pytest.approx(wanted.values, rel=1e-4)
    assert found.pairs.keys() == wanted.pairs.keys()


@pytest.mark.parametrize("search", ["bisection", "greedy"])
def test_the_searches_take_the_order_of_the_loss(isolated, search):
    plan = tune(Net(), objective="size", search=search)
    assert plan.tables["error"].metric == "interlayer_loss"
    assert plan.errors["plan"] <= 0.1
    assert any(choice.weight != "float32" for choice in plan.choices.values())


def test_a_loss_and_a_metric_work_together(isolated):
    model, asked = Net().eval(), batches(7)[0]["x"]

    def metric(net):
        with torch.no_grad():
            return 1 - relative_rms(net(asked), model(asked))

    plan = mpq_fx.tune(
        model,
        batches(),
        metric=metric,
        max_drop=0.05,
        loss=cross_entropy,
        config=config(objective="size"),
        progress=False,
    )
    assert plan.tables["error"].metric == "interlayer_loss"


def test_a_model_that_runs_a_plan_already_gets_one_of_the_loss(isolated):
    model = Net().eval()
    other = mpq_fx.tune(
        model, [b["x"] for b in batches()], config=config(sensitivity="measured"), progress=False
    )
    compiled = mpq_fx.apply(model, other)
    with torch.no_grad():
        compiled(batches()[0]["x"])
    assert tune(model).tables["error"].metric == "interlayer_loss"


# --- signs --------------------------------------------------------------------------------------


def test_a_loss_that_falls_with_every_error_still_ends_within_the_tolerance(isolated):
    """Σ rises <= 0 admits every plan; the noise beside them does not."""
    model = Net().eval()

    def falling(output, batch):
        with torch.no_grad():
            y = model(batch["x"])
        return -(output - y).square().sum()

    plan = tune(model, loss=falling, objective="size", tolerance=0.004)
    assert all(value <= 0.0 for value in plan.tables["error"].values.values())
    assert plan.errors["plan"] <= 0.004
    assert any(choice.weight != "float32" for choice in plan.choices.values())
    points = plan.frontier("size")
    assert len(points) > 2
    assert all(point["error"] > 0.0 for point in points[:-1])
    assert all(NOISE not in point for point in points)
    for point in points:
        if point["options"]:
            again = plan.resolve(**point["options"])
            assert again.provenance["predicted"]["size"] <= point["size"] * (1 + 1e-9)


def test_a_plan_with_rises_is_saved_and_loaded(isolated, tmp_path):
    plan = tune(Net(), objective="size")
    plan.save(tmp_path / "plan.json")
    again = mpq_fx.facts.Plan.load(tmp_path / "plan.json")
    assert again.tables[NOISE].values == plan.tables[NOISE].values
    assert again.resolve(tolerance=0.05).choices == plan.resolve(tolerance=0.05).choices


# --- trained nets -------------------------------------------------------------------------------


def labelled():
    images, labels, _, _ = digits()
    both = zip(images[: CALLS * DIGITS].split(DIGITS), labels.split(DIGITS), strict=False)
    return [{"images": x, "labels": y} for x, y in both]


def rises(task: Task, plans) -> list[float]:
    """By how much the loss rises, the mean over the recorded calls."""
    replay, sums = replace(task.replay, caches=False), [0.0] * len(plans)
    for record, loss in zip(task.records, task.losses, strict=True):
        base = float(loss(replay.run(record, {})))
        found = (float(loss(replay.run(record, p))) - base for p in plans)
        sums = [a + b for a, b in zip(sums, found, strict=True)]
    return [value / len(task.records) for value in sums]


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_the_rise_of_cross_entropy_is_predicted_on_a_trained_net(isolated, name):
    """Plans that the table has not seen, and better than by tables that know no labels."""

    def look(task):
        plans = [p for p in (draw(task, seed) for seed in range(1000, 1020)) if p]
        real = rises(task, plans)
        tables = {m: METRICS[m](task) for m in ("interlayer_loss", "interlayer_kl", "measured")}
        guesses = {m: [power(t, p) for p in plans] for m, t in tables.items()}
        ranks = {m: spearman(g, real) for m, g in guesses.items()}
        assert ranks["interlayer_loss"] > 0.85
        assert ranks["interlayer_loss"] > max(ranks["interlayer_kl"], ranks["measured"])
        kappa = tables["interlayer_loss"].provenance["kappa"]
        ratios = [g / kappa / r for g, r in zip(guesses["interlayer_loss"], real, strict=True)]
        assert median(ratios) == pytest.approx(1.0, abs=0.2)
        done.append(name)

    done: list[str] = []
    looked_on(SUBJECTS[name]().model, labelled(), cross_entropy, look)
    assert done == [name]


def contrastive(embeddings, batch):
    """A sentence and its paraphrase stand beside each other."""
    count = len(embeddings)
    cosines = embeddings @ embeddings.T / 0.05 - 1e4 * torch.eye(count)
    return functional.cross_entropy(cosines, torch.arange(count) ^ 1)


@pytest.mark.slow
def test_the_rise_of_a_contrastive_loss_is_predicted_on_minilm(isolated):
    def look(task):
        task = replace(
            task, records=task.records[:1], losses=task.losses[:1], deadline=float("inf")
        )
        plans = [p for p in (draw(task, seed) for seed in range(1000, 1048)) if p]
        real = rises(task, plans)
        tables = {m: METRICS[m](task) for m in ("interlayer_loss", "interlayer_hessian")}
        ranks = {m: spearman([power(t, p) for p in plans], real) for m, t in tables.items()}
        assert ranks["interlayer_loss"] > 0.7  # of choices down to 4-bit activations
        assert ranks["interlayer_loss"] > ranks["interlayer_hessian"] + 0.3
        done.append(ranks)

    subject, done = SUBJECTS["minilm"](), []
    looked_on(subject.model, list(subject.calibration), contrastive, look)
    assert len(done) == 1
