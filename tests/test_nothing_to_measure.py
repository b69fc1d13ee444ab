"""Dead outputs, gradients that vanish or are not finite: no metric calls that harmless."""

from __future__ import annotations

import pytest
import torch

import mpq_fx
from mpq_fx.errors import CalibrationError
from mpq_fx.passes.analyze.metrics.interlayer_hessian import relative_difference
from mpq_fx.passes.analyze.replay import output_error
from tests.small import Net, batch


class Dead(Net):
    def forward(self, x):
        return super().forward(x).abs().neg().relu()


class Stepped(Net):
    def forward(self, x):
        return (8 * super().forward(x)).round()


class Rooted(Net):
    """The value is finite, the gradient is not."""

    def forward(self, x):
        y = super().forward(x)
        return y + (y - y).sqrt()


def plan(model, sensitivity):
    asked = mpq_fx.Config(target="reference", tolerance=0.1, sensitivity=sensitivity)
    given = [batch(seed) for seed in range(4)]
    return mpq_fx.tune(model.eval(), given, config=asked, progress=False)


@pytest.mark.parametrize("name", ["auto", "measured", "fisher", "perturbation_hessian", "kl"])
def test_a_model_whose_outputs_are_all_zero_is_refused(isolated, name):
    with pytest.raises(CalibrationError, match="every output of the float model is zero"):
        plan(Dead(), name)


def test_a_model_whose_outputs_are_not_finite_is_refused(isolated):
    class Lost(Net):
        def forward(self, x):
            return super().forward(x) * torch.nan

    with pytest.raises(CalibrationError, match="zero or not finite on the recorded calls"):
        plan(Lost(), "measured")


GRADIENT = (
    "fisher",
    "fisher_elementwise",
    "first_order",
    "hessian_trace",
    "hessian_eigenvalue",
    "eigenvalue_spread",
    "perturbation_hessian",
    "relevance",
)


@pytest.mark.parametrize("name", GRADIENT)
def test_gradients_that_vanish_are_refused_by_every_metric_that_asks_them(isolated, name):
    with pytest.raises(CalibrationError, match="finds no harm in any choice") as caught:
        plan(Stepped(), name)
    assert caught.value.fix == 'sensitivity="measured"'


@pytest.mark.parametrize("name", GRADIENT)
def test_gradients_that_are_not_finite_are_refused_by_every_metric(isolated, name):
    with pytest.raises(CalibrationError, match=r"finds (nan|inf) for a linear") as caught:
        plan(Rooted(), name)
    assert "measured" in caught.value.fix
    assert "up" in caught.value.at or "down" in caught.value.at


@pytest.mark.parametrize("model", [Stepped, Rooted])
def test_metrics_without_gradients_plan_such_models(isolated, model):
    assert plan(model(), "measured").errors


def test_one_dead_output_beside_a_live_one_is_no_obstacle(isolated):
    class Half(Net):
        def forward(self, x):
            y = super().forward(x)
            return y, y.abs().neg().relu()

    for name in ("measured", "perturbation_hessian", "fisher"):
        assert plan(Half(), name).tables["error"].values


class Masked(Net):
    """Logits, of which the last can never be the largest."""

    def forward(self, x):
        last = torch.arange(32, device=x.device) == 31
        return super().forward(x).masked_fill(last, -torch.inf)


METRICS = ("auto", "measured_pairs", "kl", "interlayer_kl", *GRADIENT)


@pytest.mark.parametrize("name", METRICS)
def test_outputs_that_are_masked_on_purpose_are_no_error(isolated, name):
    found = plan(Masked(), name)
    assert found.error is not None
    assert 0.0 < found.error <= 0.1
    assert any(choice.weight != "float32" for choice in found.choices.values())
    assert all(value >= 0.0 for value in found.tables["error"].values.values())


def test_a_mask_that_a_choice_moves_is_an_error():
    ref = torch.tensor([3.0, 4.0, -torch.inf, torch.nan])
    same = torch.tensor([3.0, 5.0, -torch.inf, torch.nan])
    assert relative_difference([same], [ref], frozenset()).tolist() == pytest.approx([0, 0.2, 0, 0])
    for moved in (torch.inf, 7.0, torch.nan):
        other = torch.tensor([3.0, 5.0, moved, torch.nan])
        assert not relative_difference([other], [ref], frozenset()).isfinite().all()
    assert output_error([same], [ref]) == pytest.approx(0.2)
