"""A model that answers the same call differently is refused, and the op that does it is named."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional

import mpq_fx
from mpq_fx.errors import CalibrationError
from tests.small import Net, call, compiled_of, state, tune


def attention(h, chance):
    q = h[None, None]
    return functional.scaled_dot_product_attention(q, q, q, dropout_p=chance)[0, 0]


class Between(Net):
    """Something between the two layers."""

    def __init__(self, between) -> None:
        super().__init__()
        self.between = between

    def forward(self, x):
        return x + self.down(self.between(self.up(x)))


RANDOM = {
    "dropout": lambda h: functional.dropout(h, 0.1),
    "feature_dropout": lambda h: functional.dropout1d(h, 0.1),
    "alpha_dropout": lambda h: functional.alpha_dropout(h, 0.1, training=True),
    "rand_like": lambda h: h + torch.rand_like(h),
    "randn": lambda h: h + torch.randn(h.shape),
    "rand": lambda h: h * (torch.rand(1) > 0.5),
    "bernoulli": lambda h: h * torch.bernoulli(torch.full_like(h, 0.5)),
    "uniform": lambda h: h + torch.empty_like(h).uniform_(),
    "normal": lambda h: h + torch.normal(0.0, 1.0, h.shape),
    "scaled_dot_product_attention": lambda h: attention(h, 0.2),
    "rrelu": lambda h: functional.rrelu(h, training=True),
}

FIXED = {
    "dropout in eval": lambda h: functional.dropout(h, 0.5, training=False),
    "dropout of nothing": lambda h: functional.dropout(h, 0.0),
    "attention": lambda h: attention(h, 0.0),
    "rrelu in eval": functional.rrelu,
    "unused noise": lambda h: (torch.rand(3), h)[1],
}


@pytest.mark.parametrize("name", RANDOM)
def test_an_op_that_draws_is_named_with_the_user_s_line(isolated, name):
    model = Between(RANDOM[name]).eval()
    with pytest.raises(CalibrationError) as caught:
        tune(model)
    assert caught.value.what == (
        f"the model is not deterministic: {name} has another result on each call with the same "
        "inputs"
    )
    code = attention.__code__ if "attention" in name else RANDOM[name].__code__
    assert caught.value.at in {f"test_randomness.py:{line}" for *_, line in code.co_lines()}
    assert "training=self.training" in caught.value.fix


@pytest.mark.parametrize("name", FIXED)
def test_what_is_switched_off_or_unused_is_planned(isolated, name):
    assert tune(Between(FIXED[name]).eval()).choices


def test_a_dropout_module_in_training_mode_inside_a_model_in_eval_mode(isolated):
    model = Between(nn.Dropout(0.1)).eval()
    assert tune(model).choices
    model.between.train()
    with pytest.raises(CalibrationError, match="not deterministic: dropout"):
        tune(model)


def test_noise_behind_an_output_that_has_no_error_is_none_of_the_plan_s_business(isolated):
    class Index(Net):
        def forward(self, x):
            return super().forward(x), torch.randint(0, 9, (3,))

    assert tune(Index().eval()).choices


def test_two_draws_that_happen_to_be_alike_are_no_excuse(isolated):
    """One small chance on a few values: most pairs of calls agree."""
    model = Between(lambda h: functional.dropout(h, 1e-6)).eval()
    with pytest.raises(CalibrationError, match="not deterministic: dropout"):
        tune(model)


def test_under_torch_compile_it_is_told_once_and_the_model_runs_on_in_float(isolated):
    compiled = compiled_of(Between(RANDOM["dropout"]))
    with pytest.raises(CalibrationError, match="not deterministic"):
        call(compiled)
    assert call(compiled)[0].shape == (4, 32)
    assert state(compiled)[1].startswith("the model is not deterministic: dropout")


def test_on_error_float_runs_on_in_float_and_logs_it(isolated, caplog):
    compiled = compiled_of(Between(RANDOM["rand_like"]), on_error="float")
    with caplog.at_level(logging.WARNING, "mpq_fx"):
        call(compiled)
    assert "staying in float: the model is not deterministic: rand_like" in caplog.text
    assert "not deterministic" in str(mpq_fx.explain(compiled))


# --- ops that do not say what they do ----------------------------------------------------------


@torch.library.custom_op("mpq_test::noisy", mutates_args=())
def noisy(x: torch.Tensor) -> torch.Tensor:
    return x + torch.randn(x.shape)


@torch.library.custom_op("mpq_test::calm", mutates_args=())
def calm(x: torch.Tensor) -> torch.Tensor:
    return x.masked_fill(x > 0, torch.nan)


for op in (noisy, calm):
    op.register_fake(torch.empty_like)


def test_a_custom_op_is_called_twice_to_see(isolated):
    with pytest.raises(CalibrationError, match=r"not deterministic: mpq_test\.noisy"):
        tune(Between(noisy).eval())
    assert tune(Between(lambda h: torch.nan_to_num(calm(h))).eval()).choices, "NaN is like NaN"
