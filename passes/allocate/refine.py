"""solve -> measure -> correct the table -> solve again: a search around the solver's answer that
asks for the joint error of whole plans.

A table predicts P(a) = Σ T[u, a(u)] + pairs.  What K plans measured, m, corrects it: singles are
off by independent relative errors of SINGLE, all of them together by one of COMMON, and a plan by
MODEL, which the table cannot express.  The most probable table under these is linear in m - P:

    K = COMMON² P Pᵀ + Φ diag(SINGLE² T²) Φᵀ + MODEL² diag(m²),   r = K⁻¹ (m - P)
    c = 1 + COMMON² ⟨P, r⟩,   T'[j] = c T[j] + SINGLE² T[j]² ⟨φ_j, r⟩,   pairs' = c pairs

Φ[k, j] tells whether plan k has choice j.  Every answer is measured once and then excluded, so that
each round looks at a plan that nobody has measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mpq_fx.errors import ConfigError, InfeasibleError
from mpq_fx.passes.allocate.problem import ERROR, Problem, Solution, value_of, within

SINGLE, COMMON, MODEL = 0.3, 0.3, 0.02  # relative standard deviations
Solve = Callable[[Problem], Solution]


@dataclass(frozen=True)
class Tried:
    """A plan with the error that was measured, in the unit of the problem's error table."""

    solution: Solution
    error: float

    @property
    def value(self) -> tuple[float, ...]:
        """The objectives, the error as measured."""
        values = self.solution.values
        return tuple(self.error if n == ERROR else values[n] for n in self.solution.objective)


def refined(
    problem: Problem,
    solve: Solve,
    measure: Callable[[Mapping[str, str]], float],
    tried: Sequence[Tried],
    *,
    rounds: int,
    is_past: Callable[[], bool] = lambda: False,
) -> tuple[Tried, ...]:
    """What was `tried`, and up to `rounds` plans more, in the order in which they were measured.

    Ends early where no plan is left, or the corrected table proves that none left is better.
    """
    tried = tuple(tried)
    for _ in range(rounds):
        if is_past():
            break
        asked = replace(corrected(problem, tried), excluded=_assignments(tried))
        best = best_of(problem, tried)
        try:
            solution = solve(asked)
        except (InfeasibleError, ConfigError):  # nothing is left, or nothing is found in time
            break
        is_known = solution.assignment in asked.excluded  # a solver that does not look at them
        if is_known or (best is not None and _is_worse(solution, best)):
            break
        tried = (*tried, Tried(solution, measure(solution.assignment)))
    return tried


def suggested(
    problem: Problem,
    others: Sequence[Problem],
    solve: Solve,
    measure: Callable[[Mapping[str, str]], float],
    tried: Sequence[Tried],
    *,
    is_past: Callable[[], bool] = lambda: False,
) -> tuple[Tried, ...]:
    """What was `tried`, and the plan that each other error table of the problem has for best.

    That table is scaled to what was measured of the best plan so far, so that its sums compare with
    the budget.
    """
    tried = tuple(tried)
    for other in others:
        if is_past():
            break
        asked = replace(_scaled(problem, other, tried), excluded=_assignments(tried))
        try:
            solution = solve(asked)
        except (InfeasibleError, ConfigError):  # of this table nothing is left, or found in time
            continue
        if solution.assignment not in asked.excluded:
            tried = (*tried, Tried(solution, measure(solution.assignment)))
    return tried


def _scaled(problem: Problem, other: Problem, tried: Sequence[Tried]) -> Problem:
    """The problem with the other error table, its budget in the units of that table."""
    asked, best = replace(problem, error=other.error, pairs=other.pairs), best_of(problem, tried)
    limit = problem.budgets.get(ERROR)
    guess = 0.0 if best is None else value_of(asked, ERROR, best.solution.assignment)
    if best is None or limit is None or guess <= 0.0 or best.error <= 0.0:
        return asked
    return replace(asked, budgets={**asked.budgets, ERROR: limit * guess / best.error})


def best_of(problem: Problem, tried: Sequence[Tried]) -> Tried | None:
    """The best by measured errors among those whose measured error is within the budget."""
    limit = problem.budgets.get(ERROR, float("inf"))
    allowed = [each for each in tried if within(each.error, limit)]
    return min(allowed, key=lambda each: each.value, default=None)


def corrected(problem: Problem, tried: Sequence[Tried]) -> Problem:
    """The problem with the error table that what was measured makes most probable."""
    keys = list(problem.error)
    table = np.array([problem.error[key] for key in keys])
    plans = [each.solution.assignment for each in tried]
    has = np.array([[plan[u] == o for u, o in keys] for plan in plans], dtype=float)
    guessed = np.array([value_of(problem, ERROR, plan) for plan in plans])
    measured = np.array([each.error for each in tried])
    spread = np.square(SINGLE * table)
    covariance = COMMON**2 * np.outer(guessed, guessed) + (has * spread) @ has.T
    covariance += np.diag(np.square(MODEL * np.maximum(measured, np.abs(guessed))))
    known = np.diag(covariance) > 0.0  # of a plan without any error there is nothing to learn
    weights = np.zeros(len(plans))
    weights[known] = np.linalg.solve(covariance[np.ix_(known, known)], (measured - guessed)[known])
    common = max(1.0 + COMMON**2 * float(guessed @ weights), COMMON)
    found = common * table + spread * (weights @ has)
    found = np.where(table >= 0.0, np.maximum(found, 0.0), found)
    return replace(
        problem,
        error={key: float(value) for key, value in zip(keys, found, strict=True)},
        pairs={key: common * term for key, term in problem.pairs.items()},
    )


def _assignments(tried: Sequence[Tried]) -> tuple[Mapping[str, str], ...]:
    return tuple(each.solution.assignment for each in tried)


def _is_worse(solution: Solution, best: Tried) -> bool:
    """Is what is left no better in the first objective, unless that is the error, which is not
    known before it is measured?
    """
    name = solution.objective[0]
    return name != ERROR and solution.values[name] > best.solution.values[name]
