"""tune, apply and with_codes: batches in, one plan out, and the plan runs as it was tuned."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

import mpq_fx
from mpq_fx import search, tuning
from mpq_fx.errors import (
    CalibrationError,
    ConfigError,
    InfeasibleError,
    MpqError,
    PlanError,
    WeightError,
)
from mpq_fx.numerics import relative_rms
from mpq_fx.registry import bindings_of


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 8)

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        x = x + self.down(nn.functional.gelu(self.up(x)))
        return self.head(x if scale is None else x * scale)


def batch(seed: int, size: int = 4) -> torch.Tensor:
    return torch.randn(size, 32, generator=torch.Generator().manual_seed(seed))


BATCHES = [batch(seed) for seed in range(4)]


def config(**options):
    return mpq_fx.Config(**{"target": "reference", "tolerance": 0.1, **options})


def tune(model, batches=BATCHES, **options):
    given = {key: options.pop(key) for key in ("metric", "max_drop") if key in options}
    return mpq_fx.tune(model, batches, config=config(**options), progress=False, **given)


@pytest.fixture(scope="module")
def model():
    return Net().eval()


@pytest.fixture(scope="module")
def plan(model):
    return tune(model)


def named(plan):
    return {unit: choice.name for unit, choice in plan.choices.items()}


def error(compiled, model, x=None) -> float:
    x = batch(9) if x is None else x
    with torch.inference_mode():
        return relative_rms(compiled(x), model(x))


@pytest.mark.parametrize(
    "pack",
    [lambda x: (x,), lambda x: [x], lambda x: {"x": x}, lambda x: {"x": x, "scale": x[:, :1]}],
    ids=["tuple", "list", "dict", "two inputs"],
)
def test_a_batch_may_be_a_tensor_a_tuple_or_a_dict(isolated, model, plan, pack):
    found = tune(model, [pack(x) for x in BATCHES])
    assert set(found.choices) == set(plan.choices)
    if len(pack(BATCHES[0])) == 1:
        assert found.choices == plan.choices
        assert found.error == plan.error


def test_the_bar_tells_the_stage_that_planning_is_at(isolated, model, monkeypatch):
    told = []
    update = tuning.Progress.update
    monkeypatch.setattr(
        tuning.Progress, "update", lambda bar, *a, **k: told.append(k) or update(bar, *a, **k)
    )
    mpq_fx.tune(model, BATCHES, config=config(), progress=True)
    stages = [each["description"] for each in told if "description" in each]
    assert stages[0] == "planning: observe"
    assert "planning: error table" in stages
    assert "planning: solve and verify" in stages


def test_two_tunes_give_the_same_plan(isolated, model, plan):
    again = tune(model)
    timeless = {"timings": {}, "solver": None, "tables": {}, "tensors": {}}
    assert replace(again, **timeless) == replace(plan, **timeless)
    for name, table in plan.tables.items():
        assert again.tables[name].values == table.values
    assert again.tensors.keys() == plan.tensors.keys()
    assert all(torch.equal(again.tensors[name], t) for name, t in plan.tensors.items())


def test_tune_leaves_the_model_as_it_was(isolated):
    model = Net().eval()
    before = copy.deepcopy(model.state_dict())
    versions = [p._version for p in model.parameters()]
    calls = []
    model.up.register_forward_hook(lambda *_: calls.append(1))
    keys = set(model.__dict__)
    tune(model, formats=["bfloat16"])
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert [p._version for p in model.parameters()] == versions
    assert set(model.__dict__) - keys <= {"_is_torch_compile"}, "torch.compile's own mark"
    assert all(p.requires_grad for p in model.parameters())
    assert bindings_of(model) == [], "a tune leaves no graph behind"


def test_the_applied_plan_runs_what_was_tuned(isolated, model, plan):
    compiled = mpq_fx.apply(model, plan)
    found = [error(compiled, model, BATCHES[k]) for k in (2, 3)]
    assert found == pytest.approx([plan.errors["plan"], plan.error], rel=1e-6)
    ((_, binding),) = bindings_of(compiled)
    assert binding.plan is plan
    assert not binding.calls


def test_the_metric_and_max_drop_drive_the_bisection(isolated, model):
    """A drop of this metric is an error, in a shape that no calibration call had."""
    seen = []

    def metric(net) -> float:
        seen.append(1 - relative_rms(net(batch(5, 7)), model(batch(5, 7))))
        return seen[-1]

    loose = tune(model, metric=metric, max_drop=0.2, objective="size")
    rounds = len(seen)
    tight = tune(model, metric=metric, max_drop=0.004, objective="size")
    assert rounds > 3
    assert len(set(seen)) > 3, "the metric was asked about the same plan only"
    assert error(mpq_fx.apply(model, loose), model, batch(5, 7)) <= 0.2
    assert error(mpq_fx.apply(model, tight), model, batch(5, 7)) <= 0.004
    assert tight.tolerance is None
    assert len(tight.ledger) == 3, "two shapes of one graph are one plan"

    sizes = [sum(row.weight_bytes for row in plan.ledger) for plan in (loose, tight)]
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize("search", ["bisection", "greedy", "greedy_ratio"])
def test_a_search_asks_the_metric(isolated, model, search):
    drops = []

    def metric(net) -> float:
        drops.append(relative_rms(net(batch(5, 7)), model(batch(5, 7))))
        return 1 - drops[-1]

    plan = tune(model, metric=metric, max_drop=0.004, objective="size", search=search)
    assert len(set(drops)) > 2, "the metric was asked about the same plan only"
    assert error(mpq_fx.apply(model, plan), model, batch(5, 7)) <= 0.004
    assert set(named(plan).values()) != {"float32"}


def test_a_drop_that_the_examples_cannot_show_is_refused(isolated, model):
    with pytest.raises(ConfigError) as caught:
        tune(model, metric=lambda net: (0.9, 50), max_drop=0.01)
    assert "max_drop=0.01 cannot be seen on 50 examples" in caught.value.what
    assert caught.value.fix == "max_drop=0.02, or more examples"
    plan = tune(model, metric=lambda net: (0.9, 50), max_drop=0.02, formats=["bfloat16"])
    assert set(named(plan).values()) == {"bfloat16"}


def test_a_drop_that_only_the_kernels_show_is_refused(isolated, model, monkeypatch):
    """The replay stands for the kernels; what is installed is judged once more."""
    plain = tuning._measured

    def measured(metric, net):
        binding = next((b for _, b in bindings_of(model)), None)
        installed = binding is not None and binding.installed is not None and net is not model
        return (0.5, None) if installed else plain(metric, net)

    monkeypatch.setattr(tuning, "_measured", measured)
    with pytest.raises(InfeasibleError, match=r"loses 0.5 of the metric \(1 -> 0.5\)"):
        tune(model, metric=lambda net: 1.0, max_drop=0.1, formats=["bfloat16"])


def test_release_frees_the_float_weights(isolated, plan):
    model, twin = Net().eval(), Net().eval()
    compiled = mpq_fx.apply(model, plan, release=True)
    with torch.inference_mode():
        y = compiled(batch(9))
    assert relative_rms(y, twin(batch(9))) < 0.1
    for name in ("up", "down", "head"):
        assert getattr(model, name).weight.untyped_storage().nbytes() == 0
    with pytest.raises(WeightError, match="freed by apply"):
        mpq_fx.refresh(compiled)
    with torch.inference_mode():
        assert torch.equal(compiled(batch(9)), y), "the codes are still there"


def test_a_plan_with_codes_fills_a_model_on_the_meta_device(isolated, model, plan, tmp_path):
    with pytest.raises(PlanError, match=r"no values of up\.weight"):
        mpq_fx.apply(Net().to("meta").eval(), plan)
    plan.with_codes(model).save(tmp_path / "plan.json")
    empty = Net().to("meta").eval()
    filled = mpq_fx.apply(empty, tmp_path / "plan.json")
    for x in (batch(9), batch(10)):
        with torch.inference_mode():
            assert torch.equal(filled(x), mpq_fx.apply(model, plan)(x))
    floats = sum(p.numel() * 4 for p in model.parameters())
    assert (tmp_path / "plan.safetensors").stat().st_size < 0.6 * floats


def test_explain_prints_and_renders_a_run_of_the_whole_pipeline(isolated, model, plan, tmp_path):
    compiled = mpq_fx.apply(model, plan)
    with torch.inference_mode():
        compiled(batch(1))
    report = mpq_fx.explain(compiled)
    text = str(report)
    for part in ("up", "head", "linear", "proved best", "Coverage", "End to end, without"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 120
    page = report.to_html(tmp_path / "report.html").read_text()
    assert page.count("<svg") >= 3
    assert "down" in page
    assert '"mpq_fx_report": 1' in report.to_json()


def test_wishes_without_an_answer_name_what_is_within_reach(isolated, model):
    with pytest.raises(InfeasibleError) as caught:
        tune(model, tolerance=0.001, max_size="0.2x")
    lines = str(caught.value).splitlines()
    assert lines[0] == "no plan meets max_size <= 3565 bytes and tolerance <= 0.001"
    assert lines[1].startswith("    within reach: max_size <= 2864 bytes, max_size <= ")
    assert lines[1].endswith(" bytes with the other budgets kept")
    assert lines[2].startswith("    within reach: tolerance <= 0, tolerance <= 0.0")
    assert caught.value.fix.startswith("options={")


def test_the_options_that_the_error_names_are_enough(isolated, model):
    with pytest.raises(InfeasibleError) as caught:
        tune(model, tolerance=None, objective="error", max_bits=2.0)
    assert caught.value.what.startswith("no plan meets max_bits <= 2\n")
    assert caught.value.fix == 'options={"max_bits": 4.5}'
    assert set(named(tune(model, tolerance=None, objective="error", max_bits=4.5)).values()) == {
        "int4_g32*bfloat16"
    }


def test_other_options_on_a_model_that_runs_a_plan_find_a_plan_of_their_own():
    """A plan on the same weights is taken over by other shapes, not by other options."""
    model = Net().eval()
    loose = tune(model, tolerance=0.1)
    compiled = mpq_fx.apply(model, loose)
    with torch.inference_mode():
        compiled(batch(0))
    tight = tune(model, tolerance=0.001)
    assert tight.tolerance == 0.001
    assert tight.error < 0.001 < loose.error
    again = torch.compile(
        model, backend="mpq", options={"config": config(tolerance=0.001, calibration_calls=4)}
    )
    with torch.inference_mode():
        for x in BATCHES:
            again(x)
    plans = [entry.plan for entry in mpq_fx.explain(again).entries]
    assert sorted(plan.tolerance for plan in plans) == [0.001, 0.1]


@pytest.mark.parametrize(
    "wishes",
    [
        {"objective": "error", "tolerance": None, "max_bits": 6.2},
        {"objective": "error", "max_size": "0.25x"},
        {"objective": "latency", "tolerance": 0.03},
    ],
)
def test_the_plan_is_the_best_of_all_whose_error_was_measured(model, monkeypatch, wishes):
    """Plans around the solver's answer are measured, too; one that is better wins."""
    seen: dict[tuple, float] = {}

    def recorded(ask):
        def error(assignment):
            key = tuple(sorted(assignment.items()))
            assert key not in seen, "a plan was measured twice"
            seen[key] = ask(assignment)
            return seen[key]

        return error

    worst, mean = search.joint_error, search.mean_error
    monkeypatch.setattr(
        search, "joint_error", lambda measured, plan: recorded(partial(worst, measured))(plan)
    )
    monkeypatch.setattr(search, "mean_error", lambda measured: recorded(mean(measured)))
    plan = tune(model, **wishes)
    assert len(seen) > 1
    mine = tuple(sorted(named(plan).items()))
    if wishes["objective"] == "error":
        assert seen[mine] == min(seen.values())
    else:
        cost = {key: sum(plan.tables["latency"].values[item] for item in key) for key in seen}
        allowed = [key for key, error in seen.items() if error <= wishes["tolerance"]]
        assert cost[mine] == pytest.approx(min(cost[key] for key in allowed))
        again = plan.resolve(tolerance=wishes["tolerance"])  # its scale admits what was found
        assert sum(plan.tables["latency"].values[item] for item in named(again).items()) <= (
            1.000001 * cost[mine]
        )


def test_a_budget_below_what_no_choice_can_change_is_refused(isolated, model):
    with pytest.raises(InfeasibleError, match="416 of it are used by parts of the model"):
        tune(model, max_size=100.0)


def test_when_every_plan_misses_the_error_says_so_in_words(isolated, model, monkeypatch):
    """Prediction allows a plan, measurement none: budgets forbid float, the error is too large."""
    monkeypatch.setattr(search, "joint_error", lambda measured, assignment: 9.0)
    with pytest.raises(InfeasibleError) as caught:
        tune(model, tolerance=0.5, max_size="0.5x")
    assert "no plan" in caught.value.what
    assert "max_size" in caught.value.what


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metric": float}, "metric and max_drop belong together"),
        ({"max_drop": 0.1}, "metric and max_drop belong together"),
        ({"metric": float, "max_drop": -0.1}, "max_drop=-0.1 is not a share"),
        ({"metric": float, "max_drop": 1.0}, "max_drop=1.0 is not a share"),
    ],
)
def test_a_metric_and_its_drop_are_checked_at_once(model, arguments, message):
    with pytest.raises(ConfigError, match=message):
        tune(model, **arguments)


def test_batches_and_models_that_cannot_be_tuned_are_refused(isolated, model):
    with pytest.raises(CalibrationError, match="no batches"):
        tune(model, [])
    with pytest.raises(ConfigError, match="training mode"):
        tune(Net())
    with pytest.raises(ConfigError, match="not str"):
        tune(model, ["a string"])
    with pytest.raises(CalibrationError, match="ReLU cannot be planned: no graph with a site"):
        tune(nn.ReLU().eval())
    with pytest.raises(MpqError, match="int is not a compiled module"):
        mpq_fx.explain(3)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("-inf")])
def test_a_metric_of_which_there_is_no_share_is_refused(model, value):
    with pytest.raises(CalibrationError, match=f"the metric of the float model is {value:g}"):
        tune(model, metric=lambda net: value, max_drop=0.1)


def test_tune_and_apply_say_what_they_were_given_instead(model, plan):
    options = {"target": "reference"}
    for run in (mpq_fx.tune, mpq_fx.pareto):
        with pytest.raises(ConfigError, match="config is a dict, not a Config"):
            run(model, BATCHES, config=options, progress=False)
    with pytest.raises(ConfigError, match="config is a dict, not a Config"):
        mpq_fx.apply(model, plan, config=options)
    with pytest.raises(ConfigError, match=r"a torch\.nn\.Module, and was given a function"):
        tune(lambda x: x)
    with pytest.raises(ConfigError, match="tune makes a plan, and the config names one already"):
        tune(model, plan=plan)
