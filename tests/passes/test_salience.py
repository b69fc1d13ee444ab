"""Salience of weights: SliM-LLM's, SpQR's, GWQ's and MixLLM's, with the cases of their cards."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from mpq_fx.errors import CalibrationError, ConfigError
from mpq_fx.formats import Format, Int, format_named
from mpq_fx.numerics import fake_quantize
from mpq_fx.passes.analyze.linear_layers import second_moments, weight_gradients
from mpq_fx.passes.analyze.salience import (
    DAMPING,
    dense_sparse,
    fisher_change,
    hessian_salience,
    inverse_factor,
    largest,
    leave_one_out,
    outlier_threshold,
    per_feature,
    per_group,
)
from tests.architectures import values

INT3 = Format("int3_g16", Int(3), torch.float16, 16, symmetric=False)


def moment(k: int = 16) -> torch.Tensor:
    x = values(64, k).double() @ (torch.eye(k) + 0.2 * values(k, k)).double()
    return x.T @ x


# --- the factor of the inverse Hessian -----------------------------------------------------------


def test_a_factor_tells_what_rounding_costs_once_later_columns_have_adapted():
    m = moment()
    hessian = 2 * m + DAMPING * 2 * m.diagonal().mean() * torch.eye(16)
    factor = inverse_factor(m)
    for j in (0, 5, 15):
        rest = hessian[j + 1 :, j + 1 :]
        best = -torch.linalg.solve(rest, hessian[j + 1 :, j]) if len(rest) else torch.zeros(0)
        moved = torch.cat([torch.zeros(j), torch.ones(1), best]).double()
        cost = 0.5 * moved @ hessian @ moved
        assert float(0.5 / factor[j] ** 2) == pytest.approx(float(cost), rel=1e-9)


def test_a_salience_leaves_the_moments_alone():
    m = moment()
    before = m.clone()
    hessian_salience(values(8, 16), inverse_factor(m))
    assert torch.equal(m, before)


def test_a_layer_that_reads_zeros_has_no_factor():
    with pytest.raises(CalibrationError, match=r"reads is 0\.0"):
        inverse_factor(torch.zeros(4, 4))


def test_the_group_with_large_weights_and_inputs_is_salient():
    x = values(64, 32).double()
    x[:, 8:16] *= 10.0
    w = values(6, 32)
    w[:, 24:] *= 0.01
    found = per_group(hessian_salience(w, inverse_factor(x.T @ x)), 8)
    assert found.argmax() == 1
    assert found.argmin() == 3


# --- sums ----------------------------------------------------------------------------------------


def test_sums_over_groups_and_features_are_those_of_all_weights():
    x = values(6, 20)
    assert per_group(x, 8).tolist() == pytest.approx(
        [float(x[:, k : k + 8].sum()) for k in (0, 8, 16)], rel=1e-5
    )
    assert per_feature(x).tolist() == pytest.approx(x.sum(1).tolist(), rel=1e-5)


# --- SpQR ----------------------------------------------------------------------------------------


def test_the_only_outlier_is_found_and_the_rest_is_exact():
    grid = torch.tensor([-2.0, 1.5, 0.5, -1.0, 0.0, 1.0, -0.5, -1.5] * 2)  # of 3 bits
    w = torch.stack([grid.roll(2 * row) for row in range(64)])
    w[5, 6] = 200.0
    factor = torch.ones(16, dtype=torch.float64)
    kept = leave_one_out(w, factor, INT3) > outlier_threshold(w, factor)
    assert kept.nonzero().tolist() == [[5, 6]]
    assert torch.equal(dense_sparse(w, kept, INT3), w)
    assert float((fake_quantize(w, INT3) - w).abs().max()) > 1.0


def test_a_gain_is_the_error_of_the_group_less_that_of_the_others_fitted_alone():
    w, factor = values(3, 20), 0.5 + torch.rand(20, dtype=torch.float64)
    gains = leave_one_out(w, factor, INT3)
    for row, j in ((0, 0), (1, 15), (2, 16), (2, 19)):
        group = range(16) if j < 16 else range(16, 20)
        others = [i for i in group if i != j]
        whole = (fake_quantize(w, INT3) - w)[row, [*group]] / factor[[*group]]
        rest = fake_quantize(w[row, others], INT3) - w[row, others]
        wanted = whole.square().sum() - (rest / factor[others]).square().sum()
        assert float(gains[row, j]) == pytest.approx(float(wanted), rel=1e-5, abs=1e-9)


@given(st.floats(0, 5), st.floats(0, 5))
def test_a_higher_threshold_keeps_no_more(one, two):
    w, factor = values(6, 32), inverse_factor(moment(32))
    gains = leave_one_out(w, factor, INT3)
    low, high = (gains > outlier_threshold(w, factor, tau) for tau in sorted((one, two)))
    assert bool((low | ~high).all())


def test_with_an_endless_threshold_all_is_rounded():
    w, factor = values(6, 32), inverse_factor(moment(32))
    kept = leave_one_out(w, factor, INT3) > outlier_threshold(w, factor, float("inf"))
    assert torch.equal(dense_sparse(w, kept, INT3), fake_quantize(w, INT3))


def test_a_threshold_is_a_share_of_the_spread_over_rows():
    w, factor = values(40, 16), inverse_factor(moment())
    wanted = sum(float(w[:, j].double().var(correction=0) / factor[j] ** 2) for j in range(16)) / 16
    assert outlier_threshold(w, factor) == pytest.approx(0.2 * wanted)


def test_a_format_without_groups_has_none_to_leave_out():
    with pytest.raises(ConfigError, match="int8 has no groups"):
        leave_one_out(values(2, 4), torch.ones(4), format_named("int8"))


# --- GWQ -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "share", "wanted"),
    [(1000, 0.01, 10), (1001, 0.01, 11), (100, 0.07, 7), (5, 0.0, 0), (5, 1.0, 5)],
)
def test_a_share_is_rounded_up(count, share, wanted):
    scores = values(count)
    kept = largest(scores, share)
    assert int(kept.sum()) == wanted
    if 0 < wanted < count:
        assert scores[kept].min() >= scores[~kept].max()


def test_of_equal_scores_the_first_are_kept():
    assert largest(torch.ones(2, 4), 0.5).tolist() == [[True] * 4, [False] * 4]
    with pytest.raises(ConfigError, match="a share of 5"):
        largest(torch.ones(4), 5.0)


def test_what_is_kept_is_kept_bit_by_bit():
    layer, x = nn.Linear(32, 8).eval(), values(5, 32)
    w = layer.weight.detach()
    loss = lambda model, call: model(*call).square().mean()  # noqa: E731
    kept = largest(weight_gradients(layer, (x,), loss)[""].abs(), 0.01)
    assert int(kept.sum()) == 3
    mixed = dense_sparse(w, kept, INT3)
    assert torch.equal(mixed[kept], w[kept])
    assert torch.equal(mixed[~kept], fake_quantize(w.masked_fill(kept, 0.0), INT3)[~kept])


# --- MixLLM --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("residual", "ratio"), [(1.0, 1.0), (-1.0, 1.0), (2.0, 4.0)])
def test_a_change_is_exact_where_the_residual_is_one(residual, ratio):
    """L = ½ (y − target)²: the score's second-order term is residual² times the true one."""
    e = torch.tensor([-0.3, 0.2, 0.05], dtype=torch.float64)
    true = residual * e + 0.5 * e.square()
    found = fisher_change(residual * e)
    assert found.tolist() == pytest.approx((residual * e + 0.5 * ratio * e**2).abs().tolist())
    if ratio == 1.0:
        assert found.tolist() == pytest.approx(true.abs().tolist())


# --- what they are computed from -----------------------------------------------------------------


class Net(nn.Module):
    """Two layers, the first used twice and followed by an op in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 3)
        self.unused = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(input=self.first(self.first(x).relu_()).relu_())


def squares(model: nn.Module, call) -> torch.Tensor:
    return functional.mse_loss(model(*call), torch.ones(()), reduction="sum")


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_those_of_autograd(frozen):
    net, x = Net().eval(), values(4, 5, 8)
    wanted = torch.autograd.grad(squares(net, (x,)), [net.first.weight, net.second.weight])
    with torch.inference_mode():
        x = x.clone()
        found = weight_gradients(net.requires_grad_(not frozen), (x,), squares)
    torch.testing.assert_close(found["first"].float(), wanted[0])
    torch.testing.assert_close(found["second"].float(), wanted[1])
    assert not found["unused"].any()
    assert all(p.grad is None for p in net.parameters())
    assert not net.first._forward_hooks


def test_moments_are_those_of_what_a_layer_reads():
    net, calls = Net().eval(), [(values(4, 8),), (values(2, 3, 8),)]
    found = second_moments(net, calls)
    reads = [y for (x,) in calls for y in (x.reshape(-1, 8), net.first(x.reshape(-1, 8)).relu())]
    wanted = sum(y.double().T @ y.double() for y in reads)
    torch.testing.assert_close(found["first"], wanted, rtol=1e-5, atol=1e-5)
    assert not found["unused"].any()
    assert set(second_moments(net, calls, ["sec*"])) == {"second"}
    assert not net.first._forward_pre_hooks


REFUSED = {
    "training": (lambda net: second_moments(net.train(), [(values(2, 8),)]), "training mode"),
    "unknown": (lambda net: second_moments(net, [(values(2, 8),)], ["frist"]), "'frist'"),
    "none": (lambda net: second_moments(nn.Sequential(nn.ReLU()).eval(), []), "no linear layer"),
    "no calls": (lambda net: second_moments(net, []), "no call"),
    "nan": (lambda net: second_moments(net, [(torch.full((2, 8), torch.nan),)]), "16 NaN"),
    "shape": (
        lambda net: weight_gradients(net, (values(2, 8),), lambda m, c: m(*c)),
        r"is \(2, 3\)",
    ),
    "number": (lambda net: weight_gradients(net, (values(2, 8),), lambda m, c: 1.0), "is float"),
    "detached": (
        lambda net: weight_gradients(net, (values(2, 8),), lambda m, c: m(*c).detach().sum()),
        "does not depend",
    ),
    "apart": (
        lambda net: weight_gradients(net, (values(2, 8),), lambda m, c: m.unused.weight.sum()),
        "does not depend",
    ),
    "infinite": (
        lambda net: weight_gradients(net, (values(2, 8),), lambda m, c: m(*c).sum() / 0.0),
        "the loss has",
    ),
}


@pytest.mark.parametrize(("act", "text"), REFUSED.values(), ids=REFUSED)
def test_refuses(act, text):
    with pytest.raises((ConfigError, CalibrationError), match=text) as caught:
        act(Net().eval())
    assert caught.value.fix
