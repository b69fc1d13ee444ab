"""How mpq-fx and other tools pick a choice per unit under a budget.

Each takes a Problem with one budget, and returns an assignment, or None where it finds none.
`RIVALS` are other tools, written from descriptions of them, each with the metric that is nearest to
its own: baselines for bench/regret.py and bench/allocation.py, and no part of the package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from mpq_fx.errors import InfeasibleError
from mpq_fx.passes import METRICS
from mpq_fx.passes.allocate import Problem, Solution, cp_sat, is_feasible, value_of
from mpq_fx.passes.allocate.refine import Tried, best_of, refined, suggested
from mpq_fx.passes.allocate.rescaled import REFINE_ROUNDS
from mpq_fx.passes.analyze.metric import LossMetric

Assignment = dict[str, str]
Allocator = Callable[[Problem], "Assignment | None"]
Measure = Callable[[Mapping[str, str]], float]
DEFAULT = "mpq-fx, default"
SOLVE_SECONDS = 2.0  # of work, the same for all that solve
ITERATIONS = 100  # of the bisection on the largest score
BEAM = 1000  # states that a dynamic program keeps


@dataclass(frozen=True)
class Rival:
    """A tool's search: its metric by our name for it, and how it picks."""

    name: str
    metric: str
    allocate: Allocator


def without_loss() -> list[str]:
    """The metrics that ask for no loss of the user's."""
    return [name for name in METRICS if not isinstance(METRICS.named(name), LossMetric)]


def ours(metrics: Iterable[str]) -> list[Rival]:
    """The solver of mpq-fx on the table of each metric."""
    return [Rival("mpq-fx", metric, with_pairs) for metric in metrics]


def default(measure: Measure, others: Sequence[Problem]) -> Rival:
    """What mpq-fx does by default; `measure` tells the noise power of a whole plan, `others` are
    the problem with the tables that `auto` made beside its own.
    """
    return Rival(DEFAULT, "auto", partial(with_measured_plans, measure, others))


def with_pairs(problem: Problem) -> Assignment | None:
    """What mpq-fx does with a table before it measures a plan."""
    found = solved(problem)
    return None if found is None else dict(found.assignment)


def with_measured_plans(
    measure: Measure, others: Sequence[Problem], problem: Problem
) -> Assignment | None:
    """Solve with each table, measure, correct one, solve again."""
    first = solved(problem)
    if first is None:
        return None
    tried = [Tried(first, measure(first.assignment))]
    again = partial(cp_sat.solve, time_limit=SOLVE_SECONDS)
    tried = suggested(problem, others, again, measure, tried)
    found = best_of(problem, refined(problem, again, measure, tried, rounds=REFINE_ROUNDS))
    assert found is not None, "there is no limit on the error"
    return dict(found.solution.assignment)


def solved(problem: Problem) -> Solution | None:
    """The solver's answer; None if it proves that nothing keeps to the budget."""
    try:
        return cp_sat.solve(problem, time_limit=SOLVE_SECONDS)
    except InfeasibleError:
        return None


def knapsack(problem: Problem) -> Assignment | None:
    """The least sum of scores within the budget (HAWQ-V3 with traces, MCT with replays)."""
    return with_pairs(replace(problem, pairs={}))


def monotone_knapsack(problem: Problem) -> Assignment | None:
    """The same after a dearer choice was never allowed a larger score than a cheaper one."""
    score = dict(problem.error)
    for unit in problem.options:
        least = float("inf")
        for choice in by_cost(problem, unit):
            least = score[unit, choice] = min(score[unit, choice], least)
    return knapsack(replace(problem, error=score))


def threshold(problem: Problem) -> Assignment | None:
    """Bisect the largest score: each unit takes its cheapest choice at or below it.

    The last iterate is returned, whether it keeps to the budget or not.
    """
    low, high = 0.0, max(problem.error.values())
    found: Assignment = {}
    for _ in range(ITERATIONS):
        middle = (low + high) / 2
        found = {
            unit: next(
                (c for c in by_cost(problem, unit) if problem.error[unit, c] <= middle),
                by_cost(problem, unit)[-1],
            )
            for unit in problem.options
        }
        low, high = (middle, high) if spent(problem, found) > budget(problem) else (low, middle)
    return found


def ratio_sort(problem: Problem) -> Assignment | None:
    """All in the second cheapest choice; then the least error *there* first, to the cheapest."""
    found = {
        unit: by_cost(problem, unit)[min(1, len(offers) - 1)]
        for unit, offers in problem.options.items()
    }
    for unit in sorted(found, key=lambda unit: problem.error[unit, found[unit]]):
        if spent(problem, found) <= budget(problem):
            return found
        found[unit] = by_cost(problem, unit)[0]
    return found if spent(problem, found) <= budget(problem) else None


def prefix(problem: Problem) -> Assignment | None:
    """All (unit, choice) in the order of their score alone; the shortest prefix in the budget.

    A later pair of the same unit counts only if it is cheaper.
    """
    found = {unit: by_cost(problem, unit)[-1] for unit in problem.options}
    for unit, choice in sorted(problem.error, key=lambda key: problem.error[key]):
        if spent(problem, found) <= budget(problem):
            break
        if cost(problem, unit, choice) < cost(problem, unit, found[unit]):
            found[unit] = choice
    return found if spent(problem, found) <= budget(problem) else None


def beam(problem: Problem) -> Assignment | None:
    """(cost, score) states unit by unit without dominated ones; too many are thinned evenly."""
    states: list[tuple[float, float, tuple[str, ...]]] = [(0.0, 0.0, ())]
    for unit in problem.options:
        grown = (
            (used + cost(problem, unit, c), score + problem.error[unit, c], (*picks, c))
            for used, score, picks in states
            for c in problem.options[unit]
        )
        states = thinned(kept(s for s in grown if s[0] <= budget(problem) * (1 + 1e-9)))
    best = min(states, key=lambda s: s[1], default=None)
    return dict(zip(problem.options, best[2], strict=True)) if best else None


def kept(
    states: Iterable[tuple[float, float, tuple[str, ...]]],
) -> list[tuple[float, float, tuple[str, ...]]]:
    """Those that no other beats in cost and score."""
    found: list[tuple[float, float, tuple[str, ...]]] = []
    for state in sorted(states):
        if not found or state[1] < found[-1][1]:
            found.append(state)
    return found


def thinned(
    states: list[tuple[float, float, tuple[str, ...]]],
) -> list[tuple[float, float, tuple[str, ...]]]:
    if len(states) <= BEAM:
        return states
    return [states[k * (len(states) - 1) // (BEAM - 1)] for k in range(BEAM)]


def uniform(problem: Problem) -> Assignment | None:
    """One choice for all: the least score within the budget."""
    shared = set.intersection(*map(set, problem.options.values()))
    plans = [dict.fromkeys(problem.options, choice) for choice in sorted(shared)]
    within = [plan for plan in plans if is_feasible(problem, plan)]
    return min(
        within, key=lambda plan: sum(problem.error[item] for item in plan.items()), default=None
    )


def by_cost(problem: Problem, unit: str) -> list[str]:
    """The choices of a unit, the cheapest first."""
    return sorted(problem.options[unit], key=lambda choice: cost(problem, unit, choice))


def cost(problem: Problem, unit: str, choice: str) -> float:
    (resource,) = problem.budgets
    return problem.resources[resource][unit, choice]


def spent(problem: Problem, assignment: Mapping[str, str]) -> float:
    (resource,) = problem.budgets
    return value_of(problem, resource, assignment)


def budget(problem: Problem) -> float:
    (limit,) = problem.budgets.values()
    return limit


RIVALS = (
    Rival("Model-Optimizer, gradient", "fisher_elementwise", monotone_knapsack),
    Rival("Model-Optimizer, KL", "kl", threshold),
    Rival("MCT", "measured", knapsack),
    Rival("NNCF", "local_error", ratio_sort),
    Rival("AIMET", "measured", prefix),
    Rival("AutoScheme", "first_order", beam),
    Rival("HAWQ-V3", "hessian_trace", knapsack),
    Rival("uniform", "measured", uniform),
)
