"""Wrong plans and wrong ways to call: the kind of error, and what to type instead."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from torch import nn

import mpq_fx
from mpq_fx.config import Config
from mpq_fx.errors import CalibrationError, ConfigError, MpqError, PlanError
from mpq_fx.plan import load
from mpq_fx.registry import bindings_of
from tests.small import OPTIONS, Net, batch, call, compiled_of, state, tune

# --- plans -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    plan = tune(Net().eval())
    plan.save(tmp_path_factory.mktemp("plans") / "plan.json")
    return plan, tmp_path_factory.getbasetemp() / "plans0" / "plan.json"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(32, 32)), "the plan has no site '0' (linear)"),
        (
            lambda: wider(48),
            "up: the plan was made for weight_shape [64, 32], this model has [48, 32]",
        ),
        (lambda: Net().double(), "up: the plan was made for dtype float32, this model has float64"),
    ],
    ids=["other sites", "other shape", "other dtype"],
)
def test_a_plan_for_another_model_names_the_first_difference(isolated, saved, other, message):
    model = other().eval()
    x = batch(0).to(next(model.parameters()).dtype)
    for _ in range(2):
        with torch.inference_mode(), pytest.raises(PlanError) as caught:
            mpq_fx.apply(model, saved[0])(x)
        assert caught.value.what == message
        assert "mpq_fx.tune(model, batches)" in caught.value.fix


def wider(width: int) -> nn.Module:
    model = Net()
    model.up, model.down = nn.Linear(32, width), nn.Linear(width, 32)
    return model


def test_a_plan_for_another_model_with_on_error_float_runs_in_float(isolated, saved, caplog):
    model = wider(48).eval()
    compiled = mpq_fx.apply(model, saved[0], config=Config(on_error="float"))
    with caplog.at_level(logging.WARNING, "mpq_fx"):
        (y,) = call(compiled, 1)
    with torch.inference_mode():
        torch.testing.assert_close(y, model(batch(0)))  # Inductor's float, not eager
    assert caplog.messages[0].startswith("staying in float: up: the plan was made for weight_shape")
    assert "up: the plan was made for weight_shape" in str(mpq_fx.explain(compiled))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda facts: facts | {"mpq_fx_plan": 99}, "is a plan of version 99"),
        (lambda facts: {"a": 1}, "is not a plan"),
        (lambda facts: [1], "is not a plan"),
        (lambda facts: facts | {"choices": {"up": "int99"}}, "int99"),
        (lambda facts: {k: v for k, v in facts.items() if k != "ledger"}, "ledger"),
    ],
    ids=["version", "no plan", "a list", "unknown format", "missing part"],
)
def test_a_plan_of_another_version_or_a_corrupt_one_is_refused(saved, tmp_path, edit, message):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(edit(json.loads(saved[1].read_text()))))
    with pytest.raises(PlanError, match=message):
        load(path)


def test_half_a_plan_or_none_is_refused(saved, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(saved[1].read_text()[:-200])
    with pytest.raises(PlanError, match="is not JSON, or only a part of it"):
        load(path)
    with pytest.raises(PlanError, match="No such file"):
        mpq_fx.apply(Net().eval(), tmp_path / "absent.json")


def test_a_released_model_refuses_what_needs_its_weights(isolated, saved):
    model = Net().eval()
    compiled = mpq_fx.apply(model, saved[0], release=True)
    call(compiled)
    for _ in range(2):
        with pytest.raises(MpqError, match="float weights, which apply"):
            compiled(batch(0))  # with gradients
        with torch.inference_mode(), pytest.raises(MpqError, match="float weights"):
            compiled(batch(0, 7))
    assert call(compiled)[0].shape == (4, 32), "what was released for still runs"


# --- several graphs ----------------------------------------------------------------------------


class Broken(Net):
    """Two graphs, one for each layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x)
        torch._dynamo.graph_break()  # noqa: TID251
        return self.down(nn.functional.gelu(y))


RULES = {"up": ["int8"], "down": ["bfloat16"]}


def test_a_rule_may_speak_of_a_layer_in_another_graph(isolated):
    compiled = compiled_of(Broken(), formats=RULES)
    call(compiled)
    found = {row.site.name: row.choice for row in mpq_fx.explain(compiled).rows}
    assert found["up"].startswith("int8")
    assert found["down"] == "bfloat16"
    config = mpq_fx.Config(target="reference", tolerance=0.1, formats=RULES)
    plan = mpq_fx.tune(Broken().eval(), [batch(k) for k in range(3)], config=config, progress=False)
    assert plan.choices["down"].name == "bfloat16"


def test_a_graph_that_cannot_be_planned_keeps_no_other_from_it(isolated):
    compiled = compiled_of(Net(), calibration_calls=8)
    with torch.inference_mode():
        compiled(torch.zeros(4, 32))  # an inference tensor, for which Dynamo makes another graph
    call(compiled)
    with pytest.raises(CalibrationError, match="no usable calibration call"):
        mpq_fx.finalize(compiled)
    plans = [entry.plan for entry in mpq_fx.explain(compiled).entries]
    assert len(plans) == 2
    assert any(plan is not None for plan in plans)


# --- the wrong way to call ---------------------------------------------------------------------


def test_a_graph_with_gradients_is_float_and_its_gradients_are_those_of_eager(isolated):
    model = Net()
    compiled = torch.compile(model, backend="mpq", options=OPTIONS)
    compiled(batch(0)).square().sum().backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(batch(0)).square().sum().backward()
    assert all(torch.equal(g, p.grad) for g, p in zip(found, model.parameters(), strict=True))
    assert state(compiled) == (0, "training graph: float")
    assert "training graph: float" in str(mpq_fx.explain(compiled))


def test_inductor_runs_a_training_graph_on_every_other_target(isolated):
    model = nn.Linear(8, 4)
    compiled = torch.compile(model, backend="mpq")
    x = torch.randn(3, 8)
    compiled(x).square().sum().backward()
    found = model.weight.grad.clone()
    model.zero_grad()
    model(x).square().sum().backward()
    torch.testing.assert_close(found, model.weight.grad)
    assert state(compiled) == (0, "training graph: float")


def test_eval_mode_with_gradients_warns_once_with_the_line_to_type(isolated, caplog):
    model = Net().eval()
    compiled = compiled_of(model)
    with caplog.at_level(logging.WARNING, "mpq_fx"):
        for size in (4, 5, 6):
            compiled(batch(0, size))
    (message,) = caplog.messages
    assert "Net is in eval mode but gradients are on" in message
    assert "`with torch.inference_mode():`" in message
    caplog.clear()
    with caplog.at_level(logging.WARNING, "mpq_fx"):
        compiled_of(Net()).train()(batch(0))
    assert caplog.messages == []


def test_generate_on_a_wrapper_is_diagnosed_with_the_line_to_type(isolated):
    class Generator(Net):
        def generate(self, x):
            return self(x)

    model = Generator()
    compiled = compiled_of(model)
    with torch.inference_mode():
        compiled.generate(batch(0))
    line = 'model.compile(backend="mpq")'
    assert line in " ".join(str(mpq_fx.explain(compiled)).split())
    with pytest.raises(CalibrationError) as caught:
        mpq_fx.finalize(compiled)
    assert line in caught.value.fix
    call(compiled)
    assert ".generate()" not in str(mpq_fx.explain(compiled))
    model.compile(backend="mpq", options=OPTIONS)
    with torch.inference_mode():
        model.generate(batch(0))
    assert bindings_of(model)


@pytest.mark.parametrize("net", [nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.GELU())])
def test_a_module_of_torch_that_is_compiled_in_place_says_what_to_type(isolated, net):
    """Dynamo traces no frame of torch.nn, where model.compile() begins there: nothing is seen."""
    net = net.eval()
    net.compile(backend="mpq", options=OPTIONS)
    with torch.inference_mode():
        net(torch.randn(2, 4))
    (entry,) = mpq_fx.explain(net).entries
    assert entry.plan is None
    assert entry.reason.startswith(f"Dynamo skips {type(net).__name__}.compile()")
    assert 'torch.compile(model, backend="mpq")' in entry.reason
    with pytest.raises(CalibrationError, match="no compiled graph") as caught:
        mpq_fx.finalize(net)
    assert caught.value.fix == entry.reason


# --- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "what", "fix"),
    [
        (
            {"formats": {"up": ["int8/dynamc"]}},
            "formats['up']: 'int8/dynamc' is not a choice",
            "did you mean 'int8/dynamic'? valid: int8/dynamic, int8/static",
        ),
        (
            {"formats": {"up": "int8"}},
            "formats['up']='int8' is a string, not a list of names",
            'options={"formats": {"up": ["int8"]}}',
        ),
        ({"formats": 8}, "formats=8 is not a list of names", 'options={"formats": ["int8"]}'),
        ({"cache_dir": 8}, "cache_dir=8 is not a path", 'options={"cache_dir": "folder"}'),
    ],
    ids=str,
)
def test_values_that_cannot_be_meant_are_refused_at_once(options, what, fix):
    with pytest.raises(ConfigError) as caught:
        Config(**options)
    assert (caught.value.what, caught.value.fix) == (what, fix)
