"""The option `search`: what each search keeps to, refuses and says, on a compiled net."""

from __future__ import annotations

from dataclasses import replace

import pytest

import mpq_fx
from mpq_fx import settle
from mpq_fx.errors import ConfigError, InfeasibleError
from mpq_fx.passes.allocate import SEARCHES
from mpq_fx.search import CUT
from tests.small import Net, call, compiled_of


@pytest.mark.parametrize("search", ["bisection", "greedy", "greedy_ratio"])
def test_the_search_that_is_named_finds_a_plan_within_the_tolerance(isolated, search):
    compiled = compiled_of(Net(), search=search, objective="size")
    call(compiled)
    plan = mpq_fx.explain(compiled).entries[0].plan
    assert plan.solver.status == "FEASIBLE"
    assert plan.solver.bound <= plan.solver.value
    assert plan.error <= plan.tolerance * 1.5
    assert any(row.choice != "float32" for row in plan.ledger)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"search": "greedy", "max_size": "0.5x"}, "no other budget, and there is max_size"),
        (
            {"search": "bisection", "objective": "size", "tolerance": None},
            "there is tolerance=None",
        ),
        ({"search": "rco"}, "minimizes the error, and there is objective='latency'"),
        (
            {"search": "rco", "objective": "error", "max_size": "0.5x", "max_bits": 8},
            "keeps to one budget, and there are max_size, max_bits",
        ),
    ],
)
def test_what_a_search_cannot_keep_is_refused_at_the_first_call(isolated, options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        call(compiled_of(Net(), **options), 1)
    assert caught.value.fix == 'search="solver" does it all'


@pytest.mark.parametrize("search", ["solver", "greedy_ratio", "rco"])
@pytest.mark.parametrize("budget", [{"max_size": "0.4x"}, {"max_bits": 9}, {"max_latency": "0.3x"}])
def test_a_search_under_a_budget_keeps_it_and_the_tolerance(isolated, search, budget):
    compiled = compiled_of(Net(), search=search, objective="error", **budget)
    call(compiled)
    plan = mpq_fx.explain(compiled).entries[0].plan
    (name,) = budget
    resource = {"max_size": "size", "max_bits": "bits", "max_latency": "latency"}[name]
    used = sum(plan.tables[resource].values[u, c.name] for u, c in plan.choices.items())
    rest = plan.baseline[resource] - sum(
        plan.tables[resource].values[u, "float32"] for u in plan.choices
    )
    assert used + (0 if name == "max_bits" else rest) <= plan.budgets[name] * (1 + 1e-9)
    assert plan.errors["plan"] <= plan.tolerance


@pytest.mark.parametrize("search", ["solver", "greedy_ratio", "rco"])
def test_a_search_that_finds_nothing_within_its_limits_says_so(isolated, search):
    options = {"objective": "error", "max_size": "0.3x", "tolerance": 1e-4}
    with pytest.raises(InfeasibleError, match=r"tolerance <= 0\.0001|error of at most 0\.0001"):
        call(compiled_of(Net(), search=search, **options))


@pytest.mark.parametrize("search", SEARCHES)
def test_a_search_that_was_cut_short_has_a_plan_and_says_so(isolated, search):
    options = {"objective": "error", "max_size": "0.5x"} if search == "rco" else {}
    compiled = compiled_of(Net(), search=search, time_budget=1e-6, **options)
    call(compiled)
    plan = mpq_fx.explain(compiled).entries[0].plan
    assert plan.errors["plan"] <= plan.tolerance
    assert sum(CUT in note for note in plan.notes) == 1


def test_a_search_that_had_time_says_nothing(isolated):
    compiled = compiled_of(Net(), search="greedy_ratio", objective="size")
    call(compiled)
    assert not any(CUT in note for note in mpq_fx.explain(compiled).entries[0].plan.notes)


def test_kernels_that_miss_the_tolerance_are_no_excuse_to_break_a_budget(isolated, monkeypatch):
    """Float was installed, twice as large as allowed, or a tolerance named that nobody typed."""
    build = settle.build

    def worse(*args):
        built = build(*args)
        is_float = set(built.assignment.values()) == {"float32"}
        return built if is_float else replace(built, error=0.5)

    monkeypatch.setattr(settle, "build", worse)
    with pytest.raises(
        InfeasibleError, match=r"within max_size <= \d+ bytes has an error"
    ) as caught:
        call(compiled_of(Net(), objective="size", max_size="0.5x"))
    assert caught.value.fix == 'options={"tolerance": 0.5}, or a larger budget'
    compiled = compiled_of(Net(), objective="size")
    call(compiled)
    (plan,) = (entry.plan for entry in mpq_fx.explain(compiled).entries)
    assert any("float instead" in note for note in plan.notes)
