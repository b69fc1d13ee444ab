"""Problems whose answers are published or were computed by hand: experts, KV caches, pairs."""

from __future__ import annotations

import itertools
from statistics import median

import pytest
import torch
from torch.nn import functional

from mpq_fx.formats import Format, Int
from mpq_fx.numerics import fake_quantize
from mpq_fx.passes.allocate import SOLVERS, Problem, cp_sat


def problem_of(errors, bits, total, **options) -> Problem:
    """A row of errors is a unit, a column one of the bits; their sum over the units is limited."""
    names = [str(b) for b in bits]
    table = {
        (str(u), name): error
        for u, row in enumerate(errors)
        for name, error in zip(names, row, strict=True)
    }
    units = dict.fromkeys(str(u) for u in range(len(errors)))
    resources = {"bits": {key: float(key[1]) for key in table}}
    return Problem(
        options=dict.fromkeys(units, tuple(names)),
        error=table,
        objective=("error",),
        resources={**resources, **options.get("resources", {})},
        budgets={"bits": total, **options.get("budgets", {})},
        pairs=options.get("pairs", {}),
    )


def answer(problem: Problem) -> tuple[tuple[int, ...], float]:
    found = cp_sat.solve(problem)
    assert found.status == "OPTIMAL"
    return tuple(int(o) for o in found.assignment.values()), found.values["error"]


# --- AlphaQ: experts by the tails of their spectra ------------------------------------------------


@pytest.mark.parametrize(
    ("gamma", "wanted", "value"),
    [(1, (3, 3, 2, 2), 0.13671875), (3, (4, 3, 2, 1), 0.13724094), (10, (4, 4, 1, 1), None)],
)
def test_experts_with_heavier_tails_get_more_bits(gamma, wanted, value):
    alphas = (2, 3, 4, 6)
    scores = [(median(alphas) / alpha) ** gamma for alpha in alphas]
    errors = [[score * 2.0 ** (-2 * b) for b in (1, 2, 3, 4)] for score in scores]
    bits, error = answer(problem_of(errors, (1, 2, 3, 4), 10.0))
    assert bits == wanted
    if value is not None:
        assert error == pytest.approx(value, abs=5e-9)


def test_equal_tails_share_the_bits():
    bits, error = answer(
        problem_of([[2.0 ** (-2 * b) for b in (1, 2, 3, 4)]] * 4, (1, 2, 3, 4), 10)
    )
    assert sorted(bits) == [2, 2, 3, 3]
    assert error == pytest.approx(0.15625)


# --- PMQ: experts by frequency, weight and error --------------------------------------------------

SELECTED, WEIGHT = (0.4, 0.3, 0.2, 0.1), (0.45, 0.25, 0.2, 0.1)
ERRORS = ((8.0, 4.0, 1.0), (8.0, 4.0, 1.0), (10.0, 5.0, 1.0), (20.0, 6.0, 1.0))


@pytest.mark.parametrize(
    ("gamma", "counted", "wanted", "value"),
    [
        (1, True, (3, 2, 2, 1), 0.423436),
        (1, False, (3, 3, 1, 1), 0.400379),
        (2, True, (3, 2, 2, 1), 2.432872),
        (2, False, (3, 2, 2, 1), 2.432872),
    ],
)
def test_a_least_number_of_experts_with_some_bits_is_a_budget_of_the_others(
    gamma, counted, wanted, value
):
    rows = zip(SELECTED, WEIGHT, ERRORS, strict=True)
    errors = [[phi * w**1.5 * e**gamma for e in row] for phi, w, row in rows]
    plain = problem_of(errors, (1, 2, 3), 8.0)
    others = {
        f"not {b}": {key: float(key[1] != str(b)) for key in plain.error} for b in (2, 3)
    }  # one expert or more at b: at most three are not
    limits = dict.fromkeys(others, 3.0)
    counts = {"resources": others, "budgets": limits} if counted else {}
    bits, error = answer(problem_of(errors, (1, 2, 3), 8.0, **counts))
    assert bits == wanted
    assert error == pytest.approx(value, abs=1e-6)


# --- CLADO: a pair that amplifies ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("pair", "low", "value"), [(0.0, {(0, 1)}, 2.0), (2.0, {(0, 2), (1, 2)}, 2.5)]
)
def test_with_its_pair_known_two_of_three_are_others(pair, low, value):
    errors = [[1.0, 0.0], [1.0, 0.0], [1.5, 0.0]]
    bits, error = answer(problem_of(errors, (4, 8), 16.0, pairs={("0", "4", "1", "4"): pair}))
    assert tuple(k for k, b in enumerate(bits) if b == 4) in low
    assert error == value


# --- KVTuner: (bits of keys, bits of values) of a layer are one choice ---------------------------

PAIRS = [f"K{k}V{v}" for k, v in itertools.product((8, 4, 2), repeat=2)]


def width(pair: str) -> float:
    """Mean bits of a pair of formats."""
    return (int(pair[1]) + int(pair[3])) / 2


def caches(errors, budget: float) -> Problem:
    """{layer: {pair: error}} -> the problem with mean bits of the whole cache limited."""
    table = {(layer, pair): e for layer, row in errors.items() for pair, e in row.items()}
    return Problem(
        options={layer: tuple(row) for layer, row in errors.items()},
        error=table,
        objective=("error", "bits"),
        resources={"bits": {key: width(key[1]) / len(errors) for key in table}},
        budgets={"bits": budget},
    )


def test_one_layer_of_32_with_wider_keys_and_values_costs_an_eighth_of_a_bit():
    row = {"K8V8": 0.01, "K4V4": 0.1}
    errors = {f"layer {k}": row for k in range(32)} | {"layer 5": {"K8V8": 0.01, "K4V4": 2.0}}
    found = cp_sat.solve(caches(errors, 4.125))
    assert found.values["bits"] == 4.125
    assert {u for u, pair in found.assignment.items() if pair == "K8V8"} == {"layer 5"}


def test_layers_may_offer_other_pairs_than_their_neighbors():
    errors = {
        "0": {"K4V8": 0.2, "K4V2": 0.9},
        "1": {"K8V4": 0.1, "K4V2": 0.3},
        "2": {"K4V2": 0.2},
        "3": {"K4V2": 0.4},
    }
    least = cp_sat.solve(caches(errors, 3.0))
    assert set(least.assignment.values()) == {"K4V2"}
    assert least.values["bits"] == 3.0
    assert cp_sat.solve(caches(errors, 3.75)).assignment["0"] == "K4V8"


def attention_errors(q, k, v) -> dict[str, float]:
    """{pair: ‖O_pair − O‖₁ / ‖O‖₁}, keys and values rounded token by token."""

    def rounded(x, bits):
        return fake_quantize(x, Format(f"int{bits}", Int(bits), torch.float32, symmetric=False))

    exact = functional.scaled_dot_product_attention(q, k, v)
    found = {}
    for pair in PAIRS:
        keys, values = rounded(k, int(pair[1])), rounded(v, int(pair[3]))
        y = functional.scaled_dot_product_attention(q, keys, values)
        found[pair] = float((y - exact).abs().sum() / exact.abs().sum())
    return found


def planted(seed: int, outlier: float):
    """Selective attention to keys that share one large channel: their steps are coarse."""
    q, k, v = torch.randn(3, 2, 24, 16, generator=torch.Generator().manual_seed(seed)).unbind()
    k[..., 0] += outlier
    return 2 * q, k, v


def test_keys_with_an_outlier_need_more_bits_than_their_values():
    found = attention_errors(*planted(0, 40.0))
    assert found["K2V8"] > 2 * found["K8V2"]
    q, k, v = planted(0, 40.0)
    blind = attention_errors(torch.zeros_like(q), k, v)
    assert blind["K2V8"] == pytest.approx(blind["K8V8"], abs=1e-7), "q = 0: keys do not matter"


@pytest.mark.parametrize("budget", [2.5, 3.0, 4.0, 5.5])
def test_measured_errors_of_pairs_are_a_problem_like_any_other(budget):
    rows = [(0, 40.0), (1, 0.0), (2, 10.0)]
    errors = {f"layer {seed}": attention_errors(*planted(seed, size)) for seed, size in rows}
    problem = caches(errors, budget)
    found, wanted = cp_sat.solve(problem), SOLVERS["brute_force"](problem)
    assert found.values["error"] == pytest.approx(wanted.values["error"], rel=1e-9)
    assert found.values["bits"] <= budget
    if budget == 4.0:
        assert found.assignment["layer 0"][1] > found.assignment["layer 0"][3], "keys before values"
