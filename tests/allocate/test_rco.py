"""Gradients on the budget manifold: what theory says they find, and the budget, always."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from mpq_fx.errors import InfeasibleError
from mpq_fx.passes.allocate import SEARCHES, Problem, cp_sat, is_feasible, value_of
from mpq_fx.passes.allocate import rco as module
from mpq_fx.passes.allocate.manifold import retract, softmax
from mpq_fx.passes.allocate.rco import begun, rows_of, sampled
from tests.evaluators import evaluator_of, predicted

BITS = {"float": 16.0, "eight": 8.0, "four": 4.0, "two": 2.0}


def drawn(seed: int, units: int = 10, *, pairs: bool = False, edges: bool = False) -> Problem:
    """Weights of many sizes; noise falls with the bits, by a factor of its own in each unit."""
    source = np.random.default_rng(seed)
    names = [f"u{k}" for k in range(units)]
    size, error = {}, {}
    for unit in names:
        weights, scale = source.uniform(1, 5), source.lognormal(0, 1.5)
        for option, bits in BITS.items():
            size[unit, option] = weights * bits
            noise = scale * 4.0 ** -(bits / 2) * source.uniform(0.5, 2.0)
            error[unit, option] = 0.0 if option == "float" else noise
    near = {
        (u, o, v, p): float(source.uniform(0, 2))
        for u, v in itertools.pairwise(names)
        for o, p in itertools.product(BITS, BITS)
        if o != p
    }
    joint = {
        key: float(source.uniform(-1, 1)) * (error[key[:2]] * error[key[2:]]) ** 0.5 for key in near
    }
    most = sum(size[unit, "float"] for unit in names)
    return Problem(
        options=dict.fromkeys(names, tuple(BITS)),
        error=error,
        pairs=joint if pairs else {},
        resources={"size": size},
        edges={"size": near} if edges else {},
        objective=("error",),
        budgets={"size": 0.4 * most},
    )


def run(problem: Problem, evaluator=None):
    return SEARCHES["rco"].run(problem, evaluator or predicted(problem, math.inf))


def logits_of(problem: Problem, evaluator) -> np.ndarray:
    return module.descended(rows_of(problem, "size"), problem.budgets["size"], evaluator)


def descended(problem: Problem, evaluator) -> dict[str, str]:
    """The plan at the end of the descent, which the solver's own plan does not mend."""
    rows, logits = rows_of(problem, "size"), logits_of(problem, evaluator)
    return dict(module.likeliest(problem, rows, logits, evaluator))


def noise(problem: Problem, plan) -> float:
    return value_of(problem, "error", plan)


@pytest.mark.parametrize("seed", range(10))
def test_where_noise_adds_up_the_last_plan_is_near_the_optimum(seed):
    """Its logits weigh what an option costs, too, so that some of the budget may stay unused."""
    problem = drawn(seed)
    found = descended(problem, predicted(problem, math.inf))
    assert is_feasible(problem, found)
    best = cp_sat.solve(problem).values["error"]
    assert noise(problem, found) <= 1.6 * best
    assert run(problem).solution.values["error"] == pytest.approx(best), "the solver knows it all"


@pytest.mark.parametrize("seed", range(5))
def test_the_descent_lowers_the_expected_noise_nearly_to_the_optimum(seed):
    problem = drawn(seed)
    rows, budget = rows_of(problem, "size"), problem.budgets["size"]
    last = logits_of(problem, predicted(problem, math.inf))
    start, end = (
        float((softmax(logits) * rows.noise).sum())
        for logits in (retract(begun(rows), rows.costs, budget), last)
    )
    best = cp_sat.solve(problem).values["error"]
    assert end <= 1.4 * best
    assert end < 0.5 * start


def planted(joint: float, third: float = 1.5) -> tuple[Problem, dict[frozenset[str], float]]:
    """Two of three units must be low; alone they have noise 1, 1 and `third`; u0 with u1 `joint`.

    The tables know the singles only.
    """
    units = ("u0", "u1", "u2")
    alone = dict(zip(units, (1.0, 1.0, third), strict=True))
    problem = Problem(
        options=dict.fromkeys(units, ("high", "low")),
        error={(u, o): alone[u] if o == "low" else 0.0 for u in units for o in ("high", "low")},
        resources={"size": {(u, o): 1.0 + (o == "high") for u in units for o in ("high", "low")}},
        objective=("error",),
        budgets={"size": 4.0},
    )
    truth = {}
    for count in range(4):
        for low in itertools.combinations(units, count):
            both = joint - 2.0 if {"u0", "u1"} <= set(low) else 0.0
            truth[frozenset(low)] = sum(alone[u] for u in low) + both
    return problem, truth


def true_evaluator(problem: Problem, truth):
    """Measured noise with the interaction, and the derivative of its quadratic form."""
    joint = truth[frozenset({"u0", "u1"})] - 2.0
    with_pair = replace(problem, pairs={("u0", "low", "u1", "low"): joint})

    def error(plan) -> float:
        return truth[frozenset(u for u, o in plan.items() if o == "low")] ** 0.5

    return evaluator_of(error, math.inf, gradient=predicted(with_pair, math.inf).gradient)


@pytest.mark.parametrize(
    ("joint", "third", "least"), [(4.0, 1.5, 2.5), (0.0, 1.5, 0.0), (0.0, 0.5, 0.0)]
)
def test_an_interaction_that_the_tables_do_not_know_is_found(joint, third, least):
    """An amplifying pair is kept apart; a cancelling one is taken, if its units alone are worse."""
    problem, truth = planted(joint, third)
    evaluator = true_evaluator(problem, truth)
    found = descended(problem, evaluator)
    assert evaluator.error(found) ** 2 == pytest.approx(least)
    singles = cp_sat.solve(problem).assignment
    assert evaluator.error(found) <= evaluator.error(singles)


def test_it_is_no_worse_than_where_it_begins():
    """With a gradient that leads astray the solver's plan is kept."""
    problem = drawn(3)
    evaluator = predicted(problem, math.inf)
    astray = evaluator_of(
        evaluator.error,
        math.inf,
        gradient=lambda shares, k: (1.0, {key: -problem.error[key] for key in shares}),
    )
    assert noise(problem, descended(problem, astray)) > 1.1 * cp_sat.solve(problem).values["error"]
    assert run(problem, astray).solution.values["error"] == cp_sat.solve(problem).values["error"]


def test_the_steps_are_those_of_the_card(monkeypatch):
    """Written out once more: anneal, projection, Adam, retraction, transport of its moment."""
    monkeypatch.setattr(module, "STEPS", 4)
    problem = drawn(3)
    rows, budget = rows_of(problem, "size"), problem.budgets["size"]
    source = np.random.default_rng(0)
    alpha = retract(begun(rows), rows.costs, budget)
    mean = square = np.zeros_like(alpha)

    def upright() -> np.ndarray:
        share = softmax(alpha)
        return share * (rows.costs.single - (share * rows.costs.single).sum(1, keepdims=True))

    def projected(x: np.ndarray) -> np.ndarray:
        return x - (x * upright()).sum() / (upright() ** 2).sum() * upright()

    for step in range(1, 5):
        tau = 0.01 ** ((step - 1) / 3)
        soft = softmax((alpha + source.gumbel(size=alpha.shape)) / tau)
        soft = np.where(soft > 1e-3, soft, 0.0)
        soft /= soft.sum(1, keepdims=True)
        slope = projected(soft * (rows.noise - (soft * rows.noise).sum(1, keepdims=True)) / tau)
        mean, square = 0.9 * mean + 0.1 * slope, 0.999 * square + 0.001 * slope**2
        size = np.sqrt(square / (1 - 0.999**step))
        alpha = retract(alpha - 0.1 * mean / (1 - 0.9**step) / size, rows.costs, budget)
        mean = projected(mean)
    assert logits_of(problem, predicted(problem, math.inf)) == pytest.approx(alpha, abs=1e-9)


def test_what_all_derivatives_of_a_unit_have_in_common_changes_nothing():
    """⟨g, y⟩ of an option is that of the whole result, beside which options differ by little."""
    problem = drawn(3)
    plain = predicted(problem, math.inf)

    def shifted(shares, call):
        noise, given = plain.gradient(shares, call)
        return noise, {(u, o): g + 1000.0 * (1 + int(u[1:])) for (u, o), g in given.items()}

    one = logits_of(problem, plain)
    assert logits_of(problem, replace(plain, gradient=shifted)) == pytest.approx(one, abs=1e-6)


def test_the_same_plan_every_time():
    problem = drawn(5, pairs=True)
    one, two = (run(problem).solution.assignment for _ in range(2))
    assert one == two


@pytest.mark.parametrize("seed", range(4))
def test_conversions_between_neighbors_count_in_the_budget(seed):
    problem = drawn(seed, edges=True)
    found = descended(problem, predicted(problem, math.inf))
    assert is_feasible(problem, found)
    assert noise(problem, found) <= 1.3 * cp_sat.solve(problem).values["error"]


@pytest.mark.parametrize("seed", range(4))
def test_conversions_of_a_plan_that_is_nearly_sure_are_priced_exactly(seed):
    """At one plan the marginal costs count every pair twice, and the rest takes it back."""
    problem = drawn(seed, edges=True)
    rows = rows_of(problem, "size")
    picks = np.random.default_rng(seed).integers(0, len(BITS), len(rows.groups))
    score = 1e3 * np.eye(len(BITS))[picks]
    spent = value_of(problem, "size", rows.plan(picks))
    assert sampled(rows, score, 1.03 * spent).tolist() == picks.tolist()
    assert sampled(rows, score, 0.99 * spent).tolist() != picks.tolist()


def test_the_expected_cost_stays_on_the_budget_and_plans_on_the_way_within_it():
    problem = drawn(7)
    rows, budget = rows_of(problem, "size"), problem.budgets["size"]
    seen = []

    def gradient(shares, call):
        seen.append(sum(problem.resources["size"][key] * share for key, share in shares.items()))
        return 1.0, {key: problem.error[key] for key in shares}

    logits = logits_of(problem, evaluator_of(lambda _: 0.0, 1.0, gradient=gradient))
    assert rows.costs.total(softmax(logits)) == pytest.approx(budget, rel=1e-4)
    assert len(seen) == module.STEPS
    assert max(seen) <= budget * (1 + 1e-9)
    assert max(seen) > 0.95 * budget, "what the budget allows is used"


def test_a_step_that_is_not_finite_changes_nothing():
    problem = drawn(7)
    rows, budget = rows_of(problem, "size"), problem.budgets["size"]
    start = retract(begun(rows), rows.costs, budget)

    def nowhere(shares, call):
        return math.inf, dict.fromkeys(shares, 0.0)

    for options in ({"gradient": nowhere}, {"is_past": lambda: True}):
        evaluator = evaluator_of(lambda _: 0.0, 1.0, **options)
        assert np.array_equal(logits_of(problem, evaluator), start)


def test_the_float_option_does_not_begin_with_all_of_the_probability():
    rows = rows_of(drawn(0), "size")
    shares = softmax(begun(rows))
    assert (shares.max(axis=1) < 0.999).all()
    assert (shares.argmax(axis=1) == 0).all(), "the least noise is the likeliest"


def test_rows_of_ties_and_of_fewer_options():
    problem = Problem(
        options={"a": ("high", "low"), "b": ("high", "low"), "c": ("high",), "d": ("low", "high")},
        error={("a", "high"): 0.0, ("a", "low"): 1.0, ("b", "high"): 0.0, ("b", "low"): 2.0}
        | {("c", "high"): 0.0, ("d", "low"): 4.0, ("d", "high"): 0.0},
        resources={"size": {("c", "high"): 5.0}
            | {(u, o): size for u in "abd" for o, size in (("high", 3.0), ("low", 1.0))}},
        edges={"size": {("a", "low", "b", "low"): 0.5, ("a", "low", "d", "high"): 0.25}},
        objective=("error",),
        budgets={"size": 15.0},
        ties=(("a", "b"),),
    )  # fmt: skip
    rows = rows_of(problem, "size")
    assert rows.noise.tolist() == [[0.0, 3.0], [0.0, 0.0], [4.0, 0.0]]
    assert rows.costs.single.tolist() == [[6.0, 2.5], [5.0, 0.0], [1.0, 3.0]]
    ((i, j, both),) = rows.costs.pairs
    assert (i, j) == (0, 2)
    assert both.tolist() == [[0.0, 0.0], [0.0, 0.25]]
    assert rows.offered.tolist() == [[True, True], [True, False], [True, True]]
    picks = np.array([1, 0, 1])
    plan = rows.plan(picks)
    assert rows.costs.total(np.eye(2)[picks]) == value_of(problem, "size", plan)
    assert sampled(rows, np.array([[0.0, 9.0], [0.0, -np.inf], [0.0, 9.0]]), 15.0).tolist() == [
        1,
        0,
        1,
    ]
    found = run(problem)
    assert found.solution.assignment == {"a": "high", "b": "high", "c": "high", "d": "high"} or (
        is_feasible(problem, found.solution.assignment)
    )


def test_a_budget_that_all_meet_needs_no_descent():
    problem = drawn(0)
    loose = Problem(**{**vars(problem), "budgets": {"size": 1e6}})

    def never(shares, call):
        raise AssertionError("nothing to gain")

    found = run(loose, predicted(loose, 1.0, gradient=never))
    assert set(found.solution.assignment.values()) == {"float"}


def test_a_budget_out_of_reach_and_an_error_out_of_reach():
    problem = drawn(0)
    with pytest.raises(InfeasibleError):
        run(Problem(**{**vars(problem), "budgets": {"size": 1.0}}))
    assert run(problem, predicted(problem, 1e-9)) is None
