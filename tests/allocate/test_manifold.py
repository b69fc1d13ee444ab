"""Logits on a budget: the numbers of RCO's card, derivatives by finite differences, laws."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq_fx.passes.allocate.knapsack import cells_of, knapsack
from mpq_fx.passes.allocate.manifold import Costs, normal, retract, softmax, tangent

BITS = np.array([2.0, 4.0, 8.0])
GOLDEN = Costs(np.array([[0.25], [0.75]]) * BITS)


def drawn(seed: int, rows: int = 4, options: int = 3, pairs: bool = True):
    """Logits and costs, with pair terms between neighbors."""
    source = np.random.default_rng(seed)
    single = source.uniform(0.5, 4.0, (rows, options))
    both = [(i, i + 1, source.uniform(0.0, 1.0, (options, options))) for i in range(rows - 1)]
    return source.normal(size=(rows, options)), Costs(single, both if pairs else ())


def test_the_numbers_of_the_card():
    even = softmax(np.zeros((2, 3)))
    assert GOLDEN.total(even) == pytest.approx(14 / 3)
    upright = normal(even, GOLDEN)
    assert upright[0] == pytest.approx([-0.22222, -0.05556, 0.27778], abs=1e-5)
    assert upright[1] == pytest.approx([-0.66667, -0.16667, 0.83333], abs=1e-5)
    moved = retract(np.zeros((2, 3)), GOLDEN, 4.0)
    assert moved == pytest.approx(np.array([-0.1155245 * BITS] * 2), abs=1e-6)
    assert softmax(moved)[0] == pytest.approx([0.435977, 0.346035, 0.217988], abs=1e-6)


@pytest.mark.parametrize("pairs", [False, True])
def test_the_normal_is_the_derivative_of_the_cost(pairs):
    logits, costs = drawn(1, pairs=pairs)
    upright = normal(softmax(logits), costs)
    for at in np.ndindex(*logits.shape):
        ends = []
        for sign in (1, -1):
            near = logits.copy()
            near[at] += sign * 1e-6
            ends.append(costs.total(softmax(near)))
        assert upright[at] == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-7)


@given(st.integers(0, 99))
def test_a_projected_direction_does_not_change_the_cost(seed):
    logits, costs = drawn(seed)
    upright = normal(softmax(logits), costs)
    direction = np.random.default_rng(seed + 1).normal(size=logits.shape)
    assert abs((tangent(direction, upright) * upright).sum()) < 1e-6
    assert tangent(direction, np.zeros_like(upright)) == pytest.approx(direction)


@given(st.integers(0, 99), st.floats(0.05, 0.95))
def test_a_retraction_ends_on_the_budget(seed, share):
    logits, costs = drawn(seed, pairs=False)
    budget = budget_of(costs, share)
    assert costs.total(softmax(retract(logits, costs, budget))) == pytest.approx(budget, rel=1e-4)


@given(st.integers(0, 99), st.floats(0.05, 0.95))
def test_with_pairs_a_retraction_ends_on_the_budget_where_its_direction_leads_there(seed, share):
    logits, costs = drawn(seed)
    budget = budget_of(costs, share)
    before, after = (
        costs.total(softmax(at)) - budget for at in (logits, retract(logits, costs, budget))
    )
    assert abs(after) <= abs(before) + 1e-9
    if 0.2 < share < 0.6:
        assert after == pytest.approx(0.0, abs=1e-4 * budget)


def budget_of(costs, share: float) -> float:
    low, high = (costs.total(np.eye(3)[pick]) for pick in ends_of(costs))
    return low + share * (high - low)


def ends_of(costs):
    """The picks of least and of largest cost."""
    picks = [np.array(p) for p in itertools.product(range(3), repeat=len(costs.single))]
    ordered = sorted(picks, key=lambda p: costs.total(np.eye(3)[p]))
    return ordered[0], ordered[-1]


@given(st.integers(0, 99))
def test_the_cost_grows_along_the_bias(seed):
    logits, costs = drawn(seed, pairs=False)
    direction = costs.single / costs.single.max(axis=1, keepdims=True)
    seen = [costs.total(softmax(logits + t * direction)) for t in np.linspace(-9, 9, 13)]
    assert all(a < b for a, b in itertools.pairwise(seen))


@pytest.mark.parametrize(("budget", "picks"), [(1.0, [0, 0]), (99.0, [2, 2])])
def test_a_budget_out_of_reach_is_approached(budget, picks):
    assert softmax(retract(np.zeros((2, 3)), GOLDEN, budget)).argmax(axis=1).tolist() == picks


def test_an_option_that_a_row_does_not_offer_stays_out():
    logits = np.array([[0.0, 0.0, -np.inf], [0.0, 0.0, 0.0]])
    costs = Costs(np.array([[1.0, 2.0, 0.0], [1.0, 2.0, 3.0]]))
    moved = retract(logits, costs, 3.0)
    shares = softmax(moved)
    assert shares[0, 2] == 0.0
    assert costs.total(shares) == pytest.approx(3.0)


@given(st.data(), st.integers(1, 5), st.integers(1, 4), st.integers(0, 20))
def test_the_knapsack_equals_brute_force(data, rows, options, budget):
    numbers = st.lists(st.integers(0, 9), min_size=options, max_size=options)
    cells = np.array([data.draw(numbers) for _ in range(rows)])
    cells -= cells.min(axis=1, keepdims=True)
    score = np.random.default_rng(data.draw(st.integers(0, 99))).normal(size=cells.shape)

    def value(picks) -> float:
        return float(sum(score[i, k] for i, k in enumerate(picks)))

    fitting = [
        picks
        for picks in itertools.product(range(options), repeat=rows)
        if sum(cells[i, k] for i, k in enumerate(picks)) <= budget
    ]
    assert value(knapsack(score, cells, budget)) == pytest.approx(max(map(value, fitting)))


@given(st.integers(0, 99), st.floats(0.0, 1.2))
def test_what_fits_in_cells_fits_the_budget(seed, share):
    source = np.random.default_rng(seed)
    costs = source.uniform(0.0, 9.0, (5, 3))
    least, most = costs.min(axis=1).sum(), costs.max(axis=1).sum()
    budget = least + share * (most - least)
    cells = cells_of(costs, budget, 500)
    picks = knapsack(source.normal(size=costs.shape), cells, 500)
    assert costs[np.arange(5), picks].sum() <= budget * (1 + 1e-9)
    if share >= 1.0:
        score = source.normal(size=costs.shape)
        assert knapsack(score, cells, 500).tolist() == score.argmax(axis=1).tolist()
