"""The sensitivity-guided search on problems: menu, order, ties, and what is allowed."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq_fx.errors import ConfigError
from mpq_fx.passes.allocate import SEARCHES, Problem, value_of
from mpq_fx.passes.allocate.guided import menu_of
from mpq_fx.passes.allocate.problem import Condition, Term
from tests.allocate.units import OPTIONS, problem_of
from tests.evaluators import evaluator_of

GUIDED = ("bisection", "greedy")


def guided(problem: Problem, search: str, limit: float):
    """What a search ends with where the tables tell the truth."""
    evaluator = evaluator_of(lambda plan: value_of(problem, "error", plan), limit)
    return SEARCHES[search].run(problem, evaluator).solution


@pytest.mark.parametrize("search", GUIDED)
def test_the_least_sensitive_go_lowest(search):
    problem = problem_of([(0.1, 5.0), (0.1, 1.0), (9.0, 99.0), (0.1, 2.0)])
    found = guided(problem, search, 3.5)
    assert [*found.assignment.values()] == ["bfloat16", "int8", "float32", "int8"]
    assert found.values["latency"] == 2.0 + 1.0 + 4.0 + 1.0
    assert (found.status, found.bound) == ("FEASIBLE", 4.0)


@pytest.mark.parametrize("search", GUIDED)
def test_an_option_that_saves_nothing_is_not_taken(search):
    problem = problem_of([(0.0, 0.0), (0.0, 0.0)])
    slow = {**problem.resources["latency"], ("u0", "int8"): 3.0}
    problem = replace(problem, resources={"latency": slow})
    found = guided(problem, search, math.inf)
    assert found.assignment == {"u0": "bfloat16", "u1": "int8"}
    assert menu_of(problem, dict.fromkeys(problem.options, "float32")) == ["bfloat16", "int8"]


@pytest.mark.parametrize("search", GUIDED)
def test_an_option_that_saves_nothing_does_not_bar_those_behind_it(search):
    """float16 costs what bfloat16 does; after it nothing used to go lower."""
    problem = problem_of([(0.0, 1.0), (0.0, 2.0)])
    error, latency = dict(problem.error), dict(problem.resources["latency"])
    for unit in problem.options:
        error[unit, "float16"], latency[unit, "float16"] = 0.0, 2.0
    four = dict.fromkeys(problem.options, ("float32", "bfloat16", "float16", "int8"))
    problem = replace(problem, options=four, error=error, resources={"latency": latency})
    assert guided(problem, search, 1.5).assignment == {"u0": "int8", "u1": "bfloat16"}


@pytest.mark.parametrize("search", GUIDED)
def test_a_planted_pair_keeps_its_units_apart(search):
    pairs = {("u0", "int8", "u1", "int8"): 2.0}
    problem = problem_of([(0.0, 1.0), (0.0, 1.0), (0.0, 1.5)], pairs=pairs)
    found = guided(problem, search, 2.6)
    assert [*found.assignment.values()] == ["int8", "bfloat16", "int8"]


@pytest.mark.parametrize("search", GUIDED)
def test_tied_units_move_together(search):
    problem = problem_of([(0.0, 1.0), (0.0, 1.0), (0.0, 1.5)], ties=(("u0", "u1"),))
    found = guided(problem, search, 1.7)
    assert [*found.assignment.values()] == ["bfloat16", "bfloat16", "int8"]


@given(st.data(), st.integers(1, 5), st.booleans())
def test_with_one_step_of_the_menu_the_order_adds_what_raises_the_error_least(data, count, tied):
    """Terms with units that stay behind, that have moved already, and within a tie all count."""
    noise = st.floats(0, 3)
    rows = [(0.0, data.draw(noise)) for _ in range(count)]
    units = [f"u{k}" for k in range(count)]
    pairs = {
        (u, o, v, p): data.draw(st.floats(-2, 2))
        for u, v in itertools.combinations(units, 2)
        for o in OPTIONS
        for p in OPTIONS
    }
    ties = (("u0", f"u{count - 1}"),) if tied and count > 1 else ()
    problem = problem_of(rows, pairs=pairs, ties=ties)
    asked: list[dict[str, str]] = []

    def remember(assignment):
        asked.append(dict(assignment))
        return 0.0

    SEARCHES["greedy"].run(problem, evaluator_of(remember, math.inf))
    moving = (
        [[units[0], *units[-1:]], *([u] for u in units[1:-1])] if ties else [[u] for u in units]
    )
    for step, before in (("bfloat16", "float32"), ("int8", "bfloat16")):
        now = dict.fromkeys(units, before)
        for taken in (a for a in asked if step in a.values() and set(a.values()) <= {step, before}):
            left = [group for group in moving if now[group[0]] != step]
            trials = [{**now, **dict.fromkeys(group, step)} for group in left]
            least = min(value_of(problem, "error", trial) for trial in trials)
            assert value_of(problem, "error", taken) == pytest.approx(least, abs=1e-9)
            now = taken


@pytest.mark.parametrize("search", ["bisection", "greedy", "greedy_ratio", "rco"])
def test_links_are_refused_where_one_unit_changes_at_a_time(search):
    problem = replace(
        problem_of([(0.1, 1.0), (0.1, 1.0)]), links=(("u0", "u1"),), budgets={"latency": 8.0}
    )
    with pytest.raises(ConfigError, match="one unit at a time"):
        guided(problem, search, 9.0)


@pytest.mark.parametrize("search", ["greedy_ratio", "rco"])
@pytest.mark.parametrize(
    ("limit", "name"),
    [
        ({"floors": {"latency": 3.0}}, "latency"),
        (
            {
                "peaks": {"memory": ((Term(4.0, (Condition("u0", ("float32",)),)),),)},
                "budgets": {"latency": 8.0, "memory": 2.0},
            },
            "memory",
        ),
    ],
    ids=["floor", "peak"],
)
def test_limits_that_are_not_budgets_of_sums_are_refused_by_name(search, limit, name):
    problem = replace(
        problem_of([(0.1, 1.0), (0.1, 1.0)]), **{"budgets": {"latency": 8.0}, **limit}
    )
    with pytest.raises(ConfigError, match=f"{name} has a floor or a peak"):
        guided(problem, search, 9.0)
