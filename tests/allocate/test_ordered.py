"""Searches that ask an evaluator: prefixes, single steps, and an order that knows interactions."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq_fx.passes.allocate.ordered import bisection, greedy, incremental_order

MENU = ("16", "8", "4")


class Oracle:
    """Allowed while the penalties of what left the first option stay within a budget."""

    def __init__(self, penalties, budget: float) -> None:
        self.penalties, self.budget, self.asked = penalties, budget, []

    def __call__(self, assignment) -> bool:
        self.asked.append(dict(assignment))
        return self.spent(assignment) <= self.budget

    def spent(self, assignment) -> float:
        return sum(self.penalties[unit, option] for unit, option in assignment.items())


def by_penalty(oracle):
    return lambda units, _, option: sorted(units, key=lambda u: oracle.penalties[u, option])


penalties = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), min_size=1, max_size=9).map(
    lambda rows: {
        (f"u{k}", option): value
        for k, (eight, more) in enumerate(rows)
        for option, value in zip(MENU, (0, eight, eight + more), strict=True)
    }
)


def units_of(table) -> list[str]:
    return [unit for unit, option in table if option == MENU[0]]


@given(penalties, st.integers(0, 200))
def test_bisection_returns_the_longest_admissible_prefix_in_few_questions(table, budget):
    units, oracle = units_of(table), Oracle(table, budget)
    found = bisection(dict.fromkeys(units, "16"), ["8"], by_penalty(oracle), oracle)
    order = sorted(units, key=lambda unit: table[unit, "8"])
    lengths = [k for k in range(len(units) + 1) if sum(table[u, "8"] for u in order[:k]) <= budget]
    assert [unit for unit in order if found[unit] == "8"] == order[: max(lengths)]
    assert len(oracle.asked) <= math.ceil(math.log2(len(units) + 1))


@given(penalties, st.integers(0, 200))
def test_what_is_returned_is_allowed_or_the_first_option_of_all(table, budget):
    for search in (bisection, greedy):
        units, oracle = units_of(table), Oracle(table, budget)
        found = search(dict.fromkeys(units, "16"), MENU[1:], by_penalty(oracle), oracle)
        assert oracle.spent(found) <= budget
        assert found in oracle.asked or set(found.values()) == {MENU[0]}


@given(penalties, st.integers(0, 200))
def test_one_by_one_lowers_no_fewer_than_bisection_and_leaves_nothing_that_fits(table, budget):
    units, oracle = units_of(table), Oracle(table, budget)
    start, order = dict.fromkeys(units, "16"), by_penalty(oracle)
    prefix, single = (search(start, ["8"], order, oracle) for search in (bisection, greedy))
    assert sum(o == "8" for o in single.values()) >= sum(o == "8" for o in prefix.values())
    for unit, option in single.items():
        if option == MENU[0]:
            assert oracle.spent({**single, unit: "8"}) > budget


def test_with_an_evaluator_that_is_not_monotone_the_answer_was_allowed():
    allowed = [{"a": "8", "b": "8", "c": "16"}, {"a": "16", "b": "16", "c": "16"}]
    for search in (bisection, greedy):
        start = dict.fromkeys("abc", "16")
        found = search(start, ["8"], lambda units, *_: units, allowed.__contains__)
        assert found in allowed


def test_where_nothing_is_allowed_nothing_is_lowered():
    for search in (bisection, greedy):
        start = dict.fromkeys("abc", "16")
        found = search(start, MENU[1:], lambda units, *_: units, lambda _: False)
        assert set(found.values()) == {"16"}


# --- the order of the inter-layer augmented Hessian: its card's planted cases --------------------


@pytest.mark.parametrize(
    ("pair", "order"), [(0.0, "123"), (2.0, "132"), (-2.0, "123")], ids=["none", "plus", "minus"]
)
def test_a_planted_pair_moves_its_second_unit(pair, order):
    alone = {"1": 1.0, "2": 1.0, "3": 1.5}
    assert "".join(incremental_order("123", alone, {("1", "2"): pair})) == order
    assert "".join(incremental_order("123", alone, {("2", "1"): pair})) == order


@given(st.lists(st.floats(0, 10), min_size=1, max_size=8))
def test_without_pairs_it_is_the_order_of_the_singles(values):
    alone = {f"u{k}": value for k, value in enumerate(values)}
    assert incremental_order([*alone], alone, {}) == sorted(alone, key=alone.__getitem__)


@given(penalties, st.data())
def test_each_next_unit_is_the_cheapest_to_add(table, data):
    units = units_of(table)
    alone = {unit: float(table[unit, "8"]) for unit in units}
    pairs = {
        (u, v): data.draw(st.floats(-5, 5)) for k, u in enumerate(units) for v in units[k + 1 :]
    }

    def rise(chosen, unit):
        both = [pairs.get((unit, v), 0.0) + pairs.get((v, unit), 0.0) for v in chosen]
        return alone[unit] + sum(both)

    order = incremental_order(units, alone, pairs)
    assert sorted(order) == sorted(units)
    for k, unit in enumerate(order):
        least = min(rise(order[:k], other) for other in order[k:])
        assert rise(order[:k], unit) == pytest.approx(least, abs=1e-9)
