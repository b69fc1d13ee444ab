"""A plan in shapes that it was not made for: what a choice cannot do there runs in float."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest
import torch
from torch import nn

import mpq_fx
from mpq_fx import passes
from mpq_fx.errors import PlanError
from mpq_fx.facts import Choice
from mpq_fx.passes.lower.inductor import WRAPPER
from mpq_fx.passes.lower.reference import REFERENCE


@pytest.fixture
def few_rows(monkeypatch):
    """A target whose int8 is for two rows at most; `limit[0]` changes that."""
    limit = [2]

    def refuse(site, choice):
        rows = site.input_shape[0]
        many = not isinstance(rows, int) or rows > limit[0]
        if choice.weight.startswith("int") and many:
            yield f"int8 is for {limit[0]} rows, and a call has {rows}"

    monkeypatch.setattr(passes, "TARGETS", (replace(REFERENCE, refuse=refuse),))
    return limit


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32)).eval()


FORMATS = ["int8"]
STATIC = Choice("int8", "uint8_tensor", "static")
OPTIONS = {
    "formats": FORMATS,
    "target": "reference",
    "objective": "size",
    "tolerance": 0.1,
    "calibration_calls": 3,
}


def test_a_choice_for_few_rows_runs_in_float_in_a_longer_call(isolated, few_rows, net, caplog):
    compiled = torch.compile(net, backend="mpq", options=OPTIONS)
    with torch.inference_mode(), caplog.at_level(logging.WARNING):
        for seed in range(3):
            compiled(torch.randn(2, 32, generator=torch.Generator().manual_seed(seed)))
        short, long = torch.randn(2, 32), torch.randn(7, 32)
        assert not torch.equal(compiled(short), net(short))
        torch.testing.assert_close(compiled(long), net(long))
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert "0 runs in float32 in this shape: int8 is for 2 rows, and a call has " in told[0]


def test_a_plan_that_the_machine_refuses_in_its_own_shape_is_refused(isolated, few_rows, net):
    batches = [torch.randn(2, 32) for _ in range(4)]
    plan = mpq_fx.tune(net, batches, config=mpq_fx.Config(**OPTIONS), progress=False)
    few_rows[0] = 1
    with pytest.raises(PlanError, match="int8 is for 1 rows"), torch.inference_mode():
        mpq_fx.apply(net, plan)(batches[0])


def test_a_static_choice_without_its_scale_is_an_error_of_the_plan(isolated, net):
    config = mpq_fx.Config(target="reference", objective="size", tolerance=0.1, formats=FORMATS)
    batches = [torch.randn(2, 32) for _ in range(4)]
    plan = mpq_fx.tune(net, batches, config=config, progress=False)
    edited = replace(plan, choices=dict.fromkeys(plan.choices, STATIC), tensors={})
    with torch.inference_mode(), pytest.raises(PlanError, match="0: the plan has no static scale"):
        mpq_fx.apply(net, edited)(batches[0])


class Positions(nn.Module):
    """Uses the size of its batch itself, as the positions of a language model do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))

    def forward(self, x):
        at = torch.arange(x.shape[1]).expand(x.shape[0], -1)
        return self.linear(x) * at.unsqueeze(-1)


def test_a_plan_with_a_wrapper_in_cpp_runs_in_any_batch(isolated):
    torch.manual_seed(0)
    model, batches = Positions().eval(), [torch.randn(n, 6, 32) for n in (2, 2, 2, 2, 3, 5)]
    wishes = {"objective": "size", "tolerance": None, "max_size": "0.9x", "formats": ["bfloat16"]}
    config = mpq_fx.Config(target="cpu", **wishes)
    plan = mpq_fx.tune(model, batches[:4], config=config, progress=False)
    rows = tuple(replace(row, mode=WRAPPER) for row in plan.ledger)
    applied = mpq_fx.apply(model, replace(plan, ledger=rows))
    with torch.inference_mode():
        for x in batches:
            torch.testing.assert_close(applied(x), model(x), rtol=0.05, atol=0.05)


def edited_fact(plan):
    del plan["fingerprint"]["sites"]["0"]["op"]


def without_sites(plan):
    plan["fingerprint"]["sites"] = None


def without_a_choice(plan):
    del plan["choices"]["0"]


def without_scaling(plan):
    plan["choices"]["0"] = "int8"


@pytest.mark.parametrize(
    ("hand", "message"),
    [
        (edited_fact, "no op, weight_shape or dtype of a site: 0"),
        (without_sites, "no sites in its fingerprint"),
        (without_a_choice, "no choice of a site: 0"),
        (without_scaling, "0: int8 does not say when the scale of its int8 is known"),
    ],
)
@pytest.mark.parametrize("way", ["apply", "option"])
def test_a_plan_that_a_hand_broke_is_refused(isolated, net, tmp_path, hand, message, way):
    config = mpq_fx.Config(**OPTIONS)
    path = tmp_path / "plan.json"
    batches = [torch.randn(2, 32) for _ in range(3)]
    mpq_fx.tune(net, batches, config=config, progress=False).save(path)
    facts = json.loads(path.read_text())
    hand(facts)
    path.write_text(json.dumps(facts))

    def run() -> None:
        options = {"plan": path}
        made = torch.compile(net, backend="mpq", options=options) if way == "option" else None
        with torch.inference_mode():
            (made or mpq_fx.apply(net, path))(batches[0])

    with pytest.raises(PlanError, match=message):
        run()
