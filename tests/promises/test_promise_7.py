"""Wrong input gets an error with what, where and what to type (all kinds: test_bad_input.py)."""

from __future__ import annotations

import logging

import pytest
import torch

import mpq_fx
from mpq_fx.errors import ConfigError, WeightError


def test_an_error_says_what_where_and_what_to_type(isolated, world):
    model = world.Net()
    with torch.no_grad():
        model.up.weight[0, 0] = float("nan")
    compiled = world.compiled(model)
    with pytest.raises(WeightError) as caught:
        world.calibrate(compiled)
    assert str(caught.value).splitlines() == [
        "the weight up.weight holds NaN or inf",
        "  fix  load a checkpoint whose weights are finite",
    ]


def test_a_misspelled_option_names_the_nearest(world):
    with pytest.raises(ConfigError) as caught:
        mpq_fx.Config.from_options({"calibration_call": 4})
    assert caught.value.fix.startswith("did you mean 'calibration_calls'?")


def test_with_on_error_float_the_model_runs_on_and_the_ledger_says_why(isolated, world, caplog):
    model = world.Net()
    compiled = world.compiled(model, formats={"encoder.*": ["int8"]}, on_error="float")
    with caplog.at_level(logging.WARNING, "mpq_fx"):
        world.calibrate(compiled)
    assert caplog.messages[0].startswith("staying in float: formats: 'encoder.*' matches none of 6")
    with torch.inference_mode():
        assert torch.equal(compiled(world.batch(1)), model(world.batch(1)))
    report = mpq_fx.explain(compiled)
    assert {row.choice for row in report.rows} == {"float32"}
    assert {row.reason for row in report.rows} == {"formats: 'encoder.*' matches none of 6 sites"}
