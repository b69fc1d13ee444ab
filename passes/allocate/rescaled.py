"""solve, measure, rescale the error budget, solve again: the default search

Single errors do not simply add up.  Its plans are the solver's, and the measured error decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from mpq_fx.errors import InfeasibleError
from mpq_fx.passes.allocate.problem import ERROR, Problem, Solution
from mpq_fx.passes.allocate.search import Candidate, Evaluator, Search

ROUNDS = 10  # solve-and-measure rounds of a bisection


def rescaled(problem: Problem, evaluator: Evaluator) -> Candidate | None:
    """The solver's plan under the largest error budget whose measured error is allowed.

    Without a limit of the error the budgets alone decide, and one solve is enough.
    """
    if not evaluator.yardstick or math.isinf(evaluator.limit):
        exact = {} if math.isinf(evaluator.limit) else {ERROR: 0.0}
        solution = evaluator.solve(replace(problem, budgets={**problem.budgets, **exact}))
        return Candidate(solution, evaluator.error(solution.assignment))

    def solve(error_budget: float) -> Solution:
        budgets = {**problem.budgets, ERROR: error_budget}
        return evaluator.solve(replace(problem, budgets=budgets))

    start, is_past = evaluator.yardstick, evaluator.is_past
    return bisect(solve, evaluator.error, evaluator.limit, start=start, is_past=is_past)


def bisect(
    solve: Callable[[float], Solution],
    measure: Callable[[Mapping[str, str]], float],
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
        error = measure(solution.assignment)
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
    measure: Callable[[Mapping[str, str]], float],
    tolerance: float,
) -> Candidate | None:
    """The last resort: a plan without any predicted error, which is float unless budgets forbid
    it.
    """
    try:
        solution = solve(0.0)
    except InfeasibleError:  # budgets forbid float
        return None
    error = measure(solution.assignment)
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
