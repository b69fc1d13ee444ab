"""Units of several phases that share a class of options, such as the format of one weight."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from mpq_fx.errors import ConfigError, InfeasibleError
from mpq_fx.passes.allocate import (
    SOLVERS,
    Problem,
    brute_force,
    cp_sat,
    explain,
    is_feasible,
    lagrangian,
    value_of,
)
from mpq_fx.passes.allocate.exact import form_of
from mpq_fx.passes.allocate.groups import groups_of
from mpq_fx.passes.allocate.joined import MOST, joined
from mpq_fx.passes.allocate.relaxation import relax, shared_out
from tests.allocate.random_problems import rich

OPTIONS = ("f32", "w8a8/static", "w8a8/dynamic", "w8", "w4")  # of these three store 8-bit weights
CLASS = {"w8a8/static": "w8", "w8a8/dynamic": "w8"}


def phases(sites: int, names: tuple[str, ...] = ("prefill", "decode"), seed: int = 0) -> Problem:
    """Each phase has its own latency and error of a choice; the weight is stored once."""
    rng = random.Random(seed)
    units = [f"{site}@{phase}" for site in range(sites) for phase in names]
    keys = list(itertools.product(units, OPTIONS))
    width = {"f32": 32.0, "w4": 4.0}
    latency = {(u, o): rng.uniform(0.5, 1.5) * width.get(o, 8.0) for u, o in keys}
    error = {(u, o): rng.uniform(0.5, 1.5) / width.get(o, 8.0) for u, o in keys}
    size = {(u, o): width.get(o, 8.0) * u.endswith(names[0]) for u, o in keys}
    return Problem(
        options=dict.fromkeys(units, OPTIONS),
        error=error,
        objective=("latency",),
        resources={"latency": latency, "size": size},
        budgets={"error": 0.17 * len(units), "size": 12.0 * sites},
        links=tuple(tuple(f"{site}@{phase}" for phase in names) for site in range(sites)),
        classes={(u, o): CLASS.get(o, o) for u, o in keys},
    )


def weights(problem: Problem, plan) -> list[set[str]]:
    return [{problem.classes[unit, plan[unit]] for unit in link} for link in problem.links]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("names", [("prefill", "decode"), ("short", "long", "decode")])
def test_phases_share_a_weight_and_differ_in_the_rest(names, seed):
    problem = phases(6 // len(names), names, seed)
    want, got = brute_force.solve(problem), cp_sat.solve(problem)
    assert got.values["latency"] == pytest.approx(want.values["latency"], rel=1e-9)
    assert all(len(found) == 1 for found in weights(problem, got.assignment))


def test_phases_may_differ_in_activations_where_that_is_faster():
    problem = replace(phases(1), budgets={})
    latency = {**problem.resources["latency"]}
    latency |= {("0@prefill", "w8a8/static"): 0.1, ("0@decode", "w8"): 0.1}
    found = cp_sat.solve(replace(problem, resources={**problem.resources, "latency": latency}))
    assert found.assignment == {"0@prefill": "w8a8/static", "0@decode": "w8"}


def test_without_classes_a_link_is_a_tie():
    problem = replace(rich(0, coupled=False), links=(("a", "b"), ("b", "c")), classes={}, ties=())
    tied = replace(problem, links=(), ties=problem.links)
    try:
        want = brute_force.solve(tied).values
    except InfeasibleError:
        want = None
    free = {"budgets": {}, "floors": {}}
    assert want is None or cp_sat.solve(problem).values == want
    a, b = (cp_sat.solve(replace(p, **free)) for p in (problem, tied))
    assert a.values[problem.objective[0]] == b.values[problem.objective[0]]


@pytest.mark.parametrize("seed", range(5))
def test_the_bound_of_linked_units_alone_is_exact(seed):
    """A link is no constraint of the relaxation, but part of what a joined group offers."""
    problem = replace(phases(40, seed=seed), budgets={})
    form = form_of(problem)
    found = joined(form).apart(relax(joined(form).form, "latency", {}))
    assert found is not None
    plan = form.assignment(found.picks)
    assert is_feasible(problem, plan)
    assert found.bound == pytest.approx(value_of(problem, "latency", plan), rel=1e-12)
    best = sum(
        min(
            sum(
                min(problem.resources["latency"][u, o] for o in OPTIONS if CLASS.get(o, o) == name)
                for u in link
            )
            for name in ("f32", "w8", "w4")
        )
        for link in problem.links
    )
    assert found.bound == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("seed", range(40))
def test_no_plan_with_an_option_costs_less_than_the_joined_bound_says(seed):
    problem = rich(seed, coupled=False)
    form, name = form_of(problem), problem.objective[0]
    whole = joined(form)
    found = whole.apart(relax(whole.form, name, problem.budgets))
    if found is None:
        return
    for picks in itertools.product(*(range(len(group.options)) for group in form.groups)):
        plan = form.assignment(picks)
        if is_feasible(problem, plan):
            most = found.bound + max(found.extra[g, i] for g, i in enumerate(picks))
            assert most <= value_of(problem, name, plan) + 1e-9 * abs(most)


@pytest.mark.parametrize("seed", range(30))
def test_the_joined_form_has_the_same_values(seed):
    form = form_of(rich(seed))
    whole = joined(form)
    if not form.links:
        assert whole.form is form
        return
    for name, parts in form.quantities.items():
        for part, same in zip(map(shared_out, parts), whole.form.quantities[name], strict=True):
            for at in itertools.product(*(range(len(options)) for options in whole.joint)):
                picks = {
                    g: i
                    for k, c in enumerate(at)
                    for g, i in zip(whole.origins[k], whole.joint[k][c], strict=True)
                }
                assert value(same, at) == value(part, [picks[g] for g in sorted(picks)])


def value(part, picks) -> int:
    blocks = (block.get((picks[g], picks[h]), 0) for (g, h), block in part.blocks.items())
    return part.constant + sum(t[i] for t, i in zip(part.single, picks, strict=True)) + sum(blocks)


def test_more_phases_than_can_be_joined_leave_a_valid_bound():
    names = tuple(f"phase{k}" for k in range(9))
    problem = replace(phases(1, names), budgets={})
    form = form_of(problem)
    assert 3 ** len(names) > MOST
    assert len(joined(form).form.groups) == len(names), "joined, it has too many options"
    found = cp_sat.solve(problem)
    assert found.status == "OPTIMAL"
    assert all(len(classes) == 1 for classes in weights(problem, found.assignment))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("solve", [cp_sat.solve, lagrangian.solve])
def test_two_phases_of_five_hundred_sites_end_under_one_percent_of_gap(solve):
    problem = phases(500)
    found = solve(problem, time_limit=5.0)
    assert is_feasible(problem, found.assignment)
    assert found.bound <= found.values["latency"]
    assert found.gap < 0.01


def test_ties_and_links_leave_the_options_that_all_can_take():
    problem = phases(1)
    few = {"0@prefill": ("f32", "w8a8/static", "w4"), "0@decode": ("w8", "w8a8/dynamic", "w4")}
    keys = {(u, o) for u, offers in few.items() for o in offers}

    def cut(table):
        return {key: value for key, value in table.items() if key in keys}

    offered = replace(
        problem,
        options=few,
        error=cut(problem.error),
        resources={name: cut(table) for name, table in problem.resources.items()},
        classes=cut(problem.classes),
    )
    prefill, decode = groups_of(offered)
    assert prefill.options == ("w8a8/static", "w4")
    assert decode.options == ("w8", "w8a8/dynamic", "w4")
    with pytest.raises(ConfigError, match="no class of options in common"):
        replace(offered, forced={"0@prefill": "f32"})


def test_links_that_ties_contradict_are_named_not_the_budgets():
    """a = b, c = d, a ~ c, and b ~ d in other words: no class is empty, yet no plan is left."""
    options = dict.fromkeys("abcd", ("x", "y"))
    classes = {("b", "x"): "y", ("b", "y"): "x"}
    table = {(u, o): 1.0 for u in options for o in options[u]}
    problem = Problem(
        options,
        table,
        ("error",),
        budgets={"error": 9.0},
        ties=(("a", "b"), ("c", "d")),
        links=(("a", "c"), ("b", "d")),
        classes=classes,
    )
    for solve in (brute_force.solve, cp_sat.solve):
        with pytest.raises(InfeasibleError):
            solve(problem)
    assert str(explain(problem)).splitlines()[0] == (
        "no plan gives the units of each link options of one class (a ~ c; b ~ d)"
    )


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_keeps_links(name):
    problem = phases(2)
    found = SOLVERS[name](problem, hint=dict.fromkeys(problem.options, "w8"))
    assert is_feasible(problem, found.assignment)
    assert found.values["latency"] <= 1.2 * brute_force.solve(problem).values["latency"]


def test_the_same_linked_problem_gives_the_same_answer():
    first, second = (cp_sat.solve(phases(30), time_limit=1.0) for _ in range(2))
    assert replace(first, seconds=0.0) == replace(second, seconds=0.0)
