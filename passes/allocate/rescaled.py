"""solve, measure, rescale the error budget, solve again; then search around the plan: the default

Single errors do not simply add up.  Its plans are the solver's, and the measured error decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from mpq_fx.errors import InfeasibleError
from mpq_fx.passes.allocate.problem import ERROR, NOISE, Problem, Solution, value_of
from mpq_fx.passes.allocate.refine import Tried, best_of, refined, suggested
from mpq_fx.passes.allocate.search import Candidate, Evaluator, Search

ROUNDS = 10  # solve-and-measure rounds of a bisection
REFINE_SECONDS = 1.0  # of each solve with a corrected table: its answer need not be proved
REFINE_ROUNDS = 8
REFINE_SHARE = 0.57  # of the time for searching, after which no further round begins


def rescaled(problem: Problem, evaluator: Evaluator) -> Candidate | None:
    """The best plan whose error was measured: of a bisection of the solver's error budget, then,
    unless the user's metric is asked, of solves with other metrics' tables, and with one that what
    was measured corrects.
    """
    tried: list[Tried] = []

    def measure(solution: Solution) -> float:
        error = evaluator.error(solution.assignment)
        if all(solution.assignment != each.solution.assignment for each in tried):
            tried.append(Tried(solution, error**2))  # told twice it would count as two measurements
        return error

    is_free = evaluator.limit == math.inf
    if not problem.options or not (is_free or evaluator.yardstick):
        solution = evaluator.solve(_limited(problem, 0.0))  # nothing else is known to be allowed
        return Candidate(solution, measure(solution))
    if is_free:
        solution = evaluator.solve(problem)
        best: Candidate | None = Candidate(solution, measure(solution))
    else:
        best = bisect(
            lambda budget: evaluator.solve(_limited(problem, budget)),
            measure,
            evaluator.limit,
            start=evaluator.yardstick,
            is_past=evaluator.is_past,
        )
    best = best or _unchanged(problem, evaluator)
    if best is None or evaluator.exponent != 2 or NOISE in problem.resources:
        return best  # measured errors correct a table of errors, not one of a loss
    return _refined(problem, evaluator, best, tried)


def _limited(problem: Problem, error_budget: float) -> Problem:
    both = (ERROR, NOISE) if NOISE in problem.resources else (ERROR,)
    return replace(problem, budgets={**problem.budgets, **dict.fromkeys(both, error_budget)})


def _unchanged(problem: Problem, evaluator: Evaluator) -> Candidate | None:
    """The float model, unless budgets forbid it: choices that alone change nothing, or make a loss
    fall, need no predicted error, and may miss the tolerance together.
    """
    floats = {unit: offers[0] for unit, offers in problem.options.items()}
    try:
        found = evaluator.solve(replace(problem, forced=floats))
    except InfeasibleError:
        return None
    error = evaluator.error(found.assignment)
    return Candidate(found, error, 0.0) if error <= evaluator.limit else None


def _refined(
    problem: Problem, evaluator: Evaluator, best: Candidate, tried: Sequence[Tried]
) -> Candidate:
    """The best after plans of other tables, and of a corrected one; `best` if none is better."""
    is_limited = evaluator.limit < math.inf
    asked = _limited(problem, evaluator.limit**2) if is_limited else problem
    solve = partial(evaluator.solve, time_limit=REFINE_SECONDS, hint=best.solution.assignment)
    is_past = partial(evaluator.is_past, REFINE_SHARE)

    def measure(plan: Mapping[str, str]) -> float:
        return evaluator.error(plan) ** 2

    found = suggested(asked, evaluator.others, solve, measure, tried, is_past=is_past)
    found = refined(asked, solve, measure, found, rounds=REFINE_ROUNDS, is_past=is_past)
    winner = best_of(asked, found)
    if winner is None or winner.solution is best.solution:
        return best
    predicted = value_of(asked, ERROR, winner.solution.assignment)
    scale = predicted / winner.error if winner.error and predicted > 0 else best.scale
    return Candidate(winner.solution, winner.error**0.5, scale)


def bisect(
    solve: Callable[[float], Solution],
    measure: Callable[[Solution], float],
    tolerance: float,
    *,
    start: float,
    is_past: Callable[[], bool] = lambda: False,
) -> Candidate | None:
    """argmin objective s.t. *measured* error ≤ tolerance: rescale the predicted budget until it
    fits.

    The predicted noise power may be start² · scale.  Starts at scale 1, widens while the measured
    error allows, then halves the bracket geometrically; `is_past` ends that once some plan fits.
    None if no plan that was tried meets the tolerance.
    """
    best: Candidate | None = None
    good, bad, scale = 0.0, float("inf"), 1.0
    for _ in range(ROUNDS):
        solution = solve(start**2 * scale)
        error = measure(solution)
        if error <= tolerance:
            good = max(good, scale)
            best = _better(best, Candidate(solution, error, scale))
        else:
            bad = min(bad, scale)
        scale = _next_scale(good, bad, error, tolerance)
        if scale is None or (best is not None and is_past()):
            break  # without any plan that fits, looking on is cheaper than running in float
    return best or _exact(solve, measure, tolerance)


def _exact(
    solve: Callable[[float], Solution],
    measure: Callable[[Solution], float],
    tolerance: float,
) -> Candidate | None:
    """The last resort: a plan without any predicted error, which is float unless budgets forbid
    it.
    """
    try:
        solution = solve(0.0)
    except InfeasibleError:  # budgets forbid float
        return None
    error = measure(solution)
    return Candidate(solution, error, 0.0) if error <= tolerance else None


def _next_scale(good: float, bad: float, error: float, tolerance: float) -> float | None:
    """The next budget: outwards until both ends are known, then the geometric middle."""
    if good == 0.0:
        excess = error / tolerance if tolerance else math.inf
        return bad / max(2.0, min(64.0, excess**2 * 1.1)) if bad > 1e-6 else None
    if bad == float("inf"):
        return good * 2 if good < 64 else None
    return (good * bad) ** 0.5 if bad / good > 1.1 else None


def _better(old: Candidate | None, new: Candidate) -> Candidate:
    if old is None:
        return new
    values = [tuple(c.solution.values[name] for name in c.solution.objective) for c in (old, new)]
    return new if values[1] < values[0] else old


RESCALED = Search(rescaled)
