"""Bits of groups and of output features: exact errors, budgets, baselines, and a real layer."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mpq_fx.demo.nets import minilm
from mpq_fx.errors import CalibrationError, ConfigError, InfeasibleError
from mpq_fx.facts import Table
from mpq_fx.formats import Format, Int, format_named
from mpq_fx.numerics import fake_quantize, noise_power, relative_rms
from mpq_fx.passes.analyze.groups import (
    allocate,
    feature_errors,
    formats_of,
    group_errors,
    group_losses,
    mixed_features,
    mixed_groups,
)
from mpq_fx.passes.analyze.linear_layers import linear_layers, second_moments
from mpq_fx.passes.analyze.salience import hessian_salience, inverse_factor, per_group
from tests.architectures import values


def formats(group: int, *widths: int) -> list[Format]:
    return [
        Format(f"int{bits}_g{group}", Int(bits), torch.float16, group, symmetric=False)
        for bits in widths
    ]


LOW, MIDDLE, HIGH = THREE = formats(8, 2, 3, 4)
INT4, INT8 = formats(16, 4, 8)


def layer(k: int = 28, n: int = 6, positions: int = 40) -> tuple[Tensor, Tensor]:
    """(w, x): columns that are loud here and quiet there, and correlated inputs."""
    x = values(positions, k) @ (torch.eye(k) + 0.1 * values(k, k))
    return values(n, k) * torch.linspace(0.2, 3.0, k), x


def error_of(w: Tensor, x: Tensor, rounded: Tensor) -> float:
    return noise_power(x.double() @ rounded.double().T, x.double() @ w.double().T)


# --- groups --------------------------------------------------------------------------------------


def test_the_error_of_every_mixture_of_groups_is_known_exactly():
    w, x = layer()  # the last of four groups has four columns
    tables = group_errors("fc", w, (x.double().T @ x.double()), THREE)
    source = random.Random(0)
    for _ in range(20):
        plan = [source.choice(THREE) for _ in range(4)]
        keys = [(f"fc[group {k}]", fmt.name) for k, fmt in enumerate(plan)]
        pairs = tables["error"].pairs
        predicted = sum(tables["error"].values[key] for key in keys) + sum(
            pairs[(*keys[i], *keys[j])] for j in range(4) for i in range(j)
        )
        assert predicted == pytest.approx(error_of(w, x, mixed_groups(w, plan)), rel=1e-9)


def test_bits_are_those_of_codes_scales_and_zero_points():
    w, x = layer()
    bits = group_errors("fc", w, x.T @ x, THREE)["bits"].values
    uniform = sum(v for (_, name), v in bits.items() if name == MIDDLE.name)
    assert uniform == pytest.approx(3 + 4 * 24 / 28)
    assert bits["fc[group 3]", HIGH.name] == pytest.approx((4 * 4 + 24) / 28)


def test_the_allocator_finds_the_best_mixture_there_is():
    w, x = layer()
    tables = group_errors("fc", w, x.T @ x, THREE)
    budget = 3.2 + 4 * 24 / 28
    found = allocate(tables, budget)
    wanted = allocate(tables, budget, solver="brute_force")
    assert found.status == "OPTIMAL"
    assert found.values["error"] == pytest.approx(wanted.values["error"], rel=1e-9)
    assert found.values["bits"] <= budget


@pytest.mark.parametrize("seed", range(5))
def test_a_mixture_is_never_worse_than_a_uniform_weight_of_equal_bits(seed):
    w = values(6, 32, seed + 1)[..., 0]
    x = values(50, 32, seed + 1)[..., 0]
    tables = group_errors("fc", w, x.T @ x, THREE)
    found = formats_of(allocate(tables, 3 + 24 / 8), "fc", THREE)
    rounded = mixed_groups(w, found)
    assert error_of(w, x, rounded) <= error_of(w, x, fake_quantize(w, MIDDLE)) * (1 + 1e-6)


def test_the_group_that_carries_the_output_is_wide_and_the_silent_one_narrow():
    w, x = values(6, 32), values(50, 32)
    w[:, 8:16] *= 50.0
    w[:, 24:] *= 0.01
    found = formats_of(allocate(group_errors("fc", w, x.T @ x, THREE), 6.0), "fc", THREE)
    assert found[1] is HIGH
    assert found[3] is LOW


def test_losses_of_weights_are_summed_over_groups():
    w = values(6, 20)
    losses = {fmt.name: (fake_quantize(w, fmt) - w).square() for fmt in THREE}
    tables = group_losses("fc", losses, THREE)
    wanted = losses[LOW.name][:, 16:].sum()
    assert tables["error"].values["fc[group 2]", LOW.name] == pytest.approx(float(wanted))
    plain = group_errors("fc", w, torch.eye(20), THREE)  # white inputs: the same up to a factor
    ratio = float(w.square().sum())
    for key, value in tables["error"].values.items():
        assert value == pytest.approx(ratio * plain["error"].values[key], rel=1e-5)
    assert tables["bits"].values == plain["bits"].values


REFUSED = {
    "blocks": (lambda w: group_errors("fc", w, torch.eye(28), [LOW, INT4]), "one block above 0"),
    "rows": (lambda w: group_errors("fc", w, torch.eye(28), [format_named("int8")]), "int8: 0"),
    "silent": (lambda w: group_errors("fc", w, torch.zeros(28, 28), THREE), "the power 0.0"),
    "few groups": (lambda w: mixed_groups(w, THREE), "3 formats for 4 groups"),
    "few features": (lambda w: mixed_features(w, THREE), "3 formats for 6 output features"),
    "one scale": (
        lambda w: feature_errors(nn.Linear(4, 4).eval(), [], loss, [format_named("int8_tensor")]),
        "one scale for all",
    ),
    "no calls": (
        lambda w: feature_errors(nn.Linear(4, 4).eval(), [], loss, [INT4]),
        "no call",
    ),
    "budget": (
        lambda w: allocate(group_errors("fc", w, torch.eye(28), THREE), 5.0),
        "no formats have 5 bits",
    ),
    "other layer": (
        lambda w: formats_of(
            allocate(group_errors("fc", w, torch.eye(28), THREE), 9.0), "fd", THREE
        ),
        "no unit of 'fd'",
    ),
}


@pytest.mark.parametrize(("act", "text"), REFUSED.values(), ids=REFUSED)
def test_refuses(act, text):
    with pytest.raises((ConfigError, CalibrationError, InfeasibleError), match=text):
        act(layer()[0])


def test_the_printed_budget_is_enough_when_typed():
    tables = group_errors("fc", layer()[0], torch.eye(28), THREE)
    with pytest.raises(InfeasibleError, match=r"bits=5\.4286 or more"):
        allocate(tables, 5.0)
    assert set(allocate(tables, 5.4286).assignment.values()) == {LOW.name}


# --- SliM-LLM's search, as the baseline ----------------------------------------------------------


def double_pointer(w: Tensor, x: Tensor, moment: Tensor) -> tuple[int, list[Format]]:
    """(i, formats): i groups least salient a bit lower, i most salient a bit higher; least KL.

    The code of the paper never tries i = 0; here it does.
    """
    salience = per_group(hessian_salience(w, inverse_factor(moment)), MIDDLE.block)
    order = salience.argsort(stable=True).tolist()
    wanted, best = (x @ w.T).log_softmax(-1), (float("inf"), 0, [MIDDLE] * len(order))
    for i in range(len(order) // 2 + 1):
        widths = dict.fromkeys(order[:i], LOW) | dict.fromkeys(order[len(order) - i :], HIGH)
        plan = [widths.get(k, MIDDLE) for k in range(len(order))]
        got = (x @ mixed_groups(w, plan).T).log_softmax(-1)
        kl = functional.kl_div(wanted, got, reduction="batchmean", log_target=True)
        best = min(best, (float(kl), i, plan), key=lambda found: found[:2])
    return best[1], best[2]


@pytest.mark.parametrize("groups", [2, 5, 8])
def test_symmetric_steps_keep_the_mean(groups):
    w, x = layer(8 * groups)
    _, plan = double_pointer(w, x, x.T @ x)
    assert sum(fmt.element.bits for fmt in plan) == 3 * groups


def test_both_give_the_loudest_group_more_and_the_silent_one_less():
    w, x = values(6, 32), values(50, 32)
    w[:, 8:16] *= 50.0
    w[:, 24:] *= 0.01
    steps, plan = double_pointer(w, x, x.T @ x)
    assert steps >= 1
    assert plan[1] is HIGH
    assert plan[3] is LOW


def test_where_nothing_is_salient_nothing_moves():
    w, x = values(6, 8).repeat(1, 4), values(200, 32)
    steps, plan = double_pointer(w, x, x.T @ x)
    assert steps == 0
    assert plan == [MIDDLE] * 4
    found = allocate(group_errors("fc", w, x.T @ x, THREE), 6.0)
    assert set(found.assignment.values()) == {MIDDLE.name}


@pytest.mark.parametrize("seed", range(4))
def test_the_allocator_is_never_worse_than_the_double_pointer(seed):
    w = values(6, 40, seed + 1)[..., 0] * torch.linspace(0.2, 4.0, 40)
    x = values(60, 40, seed + 1)[..., 0]
    _, plan = double_pointer(w, x, x.T @ x)
    found = formats_of(allocate(group_errors("fc", w, x.T @ x, THREE), 6.0), "fc", THREE)
    mixed, baseline = (error_of(w, x, mixed_groups(w, p)) for p in (found, plan))
    assert mixed <= baseline * (1 + 1e-6)


# --- output features -----------------------------------------------------------------------------


class Net(nn.Module):
    """Two layers of equal width; nothing reads on from the first feature of `up`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(32, 24), nn.Linear(24, 32)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(24)
        mask[0] = 0.0
        return self.down(functional.gelu(self.up(x)) * mask)


def loss(model: nn.Module, call) -> Tensor:
    return functional.cross_entropy(model(*call), torch.arange(len(call[0])))


def samples(count: int) -> list[tuple[Tensor]]:
    return [(values(1, 32, k + 1)[..., 0],) for k in range(count)]


def test_a_feature_that_nothing_reads_costs_nothing():
    tables = feature_errors(Net().eval(), samples(4), loss, [INT4, INT8])
    low = {u: v for (u, name), v in tables["error"].values.items() if name == INT4.name}
    assert low.pop("up[feature 0]") == 0.0
    assert len(low) == 55
    assert min(low.values()) > 0.0
    least = sum(v for (_, name), v in tables["bits"].values.items() if name == INT4.name)
    found = allocate(tables, least + 2.0)
    assert found.assignment["up[feature 0]"] == INT4.name


def test_a_score_is_the_change_of_the_loss_by_its_first_and_fisher_terms():
    net, calls = Net().eval(), samples(3)
    tables = feature_errors(net, calls, loss, [INT4], ["up"])
    w = net.up.weight
    delta = (fake_quantize(w.detach(), INT4) - w.detach()).double()
    wanted = torch.zeros(24, dtype=torch.float64)
    for call in calls:
        (g,) = torch.autograd.grad(loss(net, call), w)
        t = (g.double() * delta).sum(1)
        wanted += (t + 0.5 * t**2).abs()
    assert [*tables["error"].values.values()] == pytest.approx(wanted.tolist(), rel=1e-4)


def test_samples_are_looked_at_one_by_one():
    calls = samples(4)
    together = [(torch.cat([x for (x,) in calls]),)]
    one, all_at_once = (
        feature_errors(Net().eval(), given, mean_square, [INT4])["error"].values
        for given in (calls, together)
    )
    ratios = [all_at_once[key] / one[key] for key in one if one[key]]
    assert max(ratios) < 0.9
    assert max(ratios) > 2 * min(ratios), "signs of samples cancel here more than there"


def mean_square(model: nn.Module, call) -> Tensor:
    return (model(*call) - torch.linspace(-2.0, 2.0, 32)).square().mean()


def test_a_share_of_all_features_is_wide_wherever_they_are():
    model = nn.Sequential(nn.Linear(32, 40), nn.GELU(), nn.Linear(40, 32)).eval()
    model[0].weight.data *= 3.0
    same = [INT4, INT8]
    tables = feature_errors(model, samples(6), loss, same)
    low, high = (
        sum(v for (_, name), v in tables["bits"].values.items() if name == fmt.name) for fmt in same
    )
    assert low == pytest.approx((4 + 2 * 24 / 32) / 2 + (4 + 3 * 24 / 40) / 2)
    found = allocate(tables, low + 0.25 * (high - low))
    wide = {u for u, name in found.assignment.items() if name == INT8.name}
    weights = sum(32 if u.startswith("0") else 40 for u in wide)
    assert 0.24 < weights / (32 * 40 * 2) <= 0.25
    shares = [sum(u.startswith(name) for u in wide) / n for name, n in (("0", 40), ("2", 32))]
    assert abs(shares[0] - shares[1]) > 0.1
    rows = formats_of(found, "0", same)
    w = model[0].weight.detach()
    for o, row in enumerate(mixed_features(w, rows)):
        assert torch.equal(row, fake_quantize(w[o : o + 1], rows[o])[0])


def test_with_rows_of_one_length_the_most_salient_are_chosen():
    model = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32)).eval()
    tables = feature_errors(model, samples(6), loss, [INT4, INT8])
    errors = tables["error"].values
    units = list(dict.fromkeys(u for u, _ in errors))
    gain = {u: errors[u, INT4.name] - errors[u, INT8.name] for u in units}
    wanted = set(sorted(units, key=gain.__getitem__, reverse=True)[:16])
    each = tables["bits"].values
    low, high = (each[units[0], fmt.name] for fmt in (INT4, INT8))
    found = allocate(tables, 64 * low + 16 * (high - low))
    assert {u for u, name in found.assignment.items() if name == INT8.name} == wanted


# --- a trained encoder ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder():
    return minilm()


def test_mixed_groups_of_a_trained_layer_beat_a_uniform_weight_on_other_sentences(encoder):
    name = "net.encoder.layer.3.intermediate.dense"
    w = linear_layers(encoder.model)[name].weight.detach()
    seen = second_moments(encoder.model, encoder.calibration[:2], [name])[name]
    other = second_moments(encoder.model, encoder.measured[:2], [name])[name]
    three = formats(32, 2, 3, 4)
    tables = group_errors(name, w, seen, three)
    judge = group_errors(name, w, other, three)
    uniform = {u: three[1].name for u, _ in tables["error"].values}
    budget = sum(tables["bits"].values[key] for key in uniform.items())
    found = allocate(tables, budget)
    assert found.status == "OPTIMAL"
    assert found.values["bits"] <= budget * (1 + 1e-9)
    assert error_in(judge, found.assignment) < 0.9 * error_in(judge, uniform)


def error_in(tables: dict[str, Table], plan) -> float:
    keys = {*plan.items()}
    pairs = tables["error"].pairs.items()
    both = sum(v for (u, c, o, d), v in pairs if (u, c) in keys and (o, d) in keys)
    return sum(tables["error"].values[key] for key in keys) + both


def test_salient_features_of_a_trained_encoder_beat_random_ones_on_other_sentences(encoder):
    model, layers = encoder.model, ["net.encoder.layer.5.*"]
    ids, mask = encoder.calibration[0]
    calls = [(ids[k : k + 1], mask[k : k + 1]) for k in range(8)]
    directions = torch.randn(384, generator=torch.Generator().manual_seed(0))
    narrow, wide = formats(128, 3, 8)
    tables = feature_errors(
        model, calls, lambda m, call: (m(*call) * directions).sum(), [narrow, wide], layers
    )
    chosen = linear_layers(model, layers)
    weights = {name: m.weight.detach() for name, m in chosen.items()}
    low = sum(v for (_, name), v in tables["bits"].values.items() if name == narrow.name)
    found = allocate(tables, low + 0.1 * 5)
    salient = {
        n: mixed_features(w, formats_of(found, n, [narrow, wide])) for n, w in weights.items()
    }
    source = torch.Generator().manual_seed(0)
    drawn = {
        n: torch.where(
            torch.rand(len(w), 1, generator=source) < 0.1,
            fake_quantize(w, wide),
            fake_quantize(w, narrow),
        )
        for n, w in weights.items()
    }
    exact, best, other = (embeddings(encoder, given) for given in (weights, salient, drawn))
    assert relative_rms(best, exact) < 0.9 * relative_rms(other, exact)


def embeddings(subject, weights: dict[str, Tensor]) -> Tensor:
    """Those of two batches of other sentences, with some weights replaced for the time."""
    parameters = {f"{name}.weight": w for name, w in weights.items()}
    with torch.no_grad():
        calls = subject.measured[:2]
        return torch.cat([torch.func.functional_call(subject.model, parameters, c) for c in calls])
