"""min_a max_λ>=0  c(a) + Σ_r λ_r · (use_r(a) - budget_r): fast, with a proved gap."""

from __future__ import annotations

from collections.abc import Mapping

from mpq_fx.errors import ConfigError
from mpq_fx.passes.allocate.lexicographic import descend, solution_of
from mpq_fx.passes.allocate.minimize import Level, Search, start
from mpq_fx.passes.allocate.problem import TOLERANCE, Problem, Solution, relative_gap


def solve(
    problem: Problem, *, time_limit: float = 10.0, hint: Mapping[str, str] | None = None
) -> Solution:
    """The better of the relaxation's plan and `hint`, with the dual bound.

    Status is OPTIMAL only where the bound is met.  Takes a bounded number of steps, whatever
    `time_limit`.
    """
    descent = descend(problem, _minimize, time_limit, hint)
    if descent.levels[-1].assignment is None:
        raise ConfigError(
            "the lagrangian solver found no plan; that is no proof that there is none",
            fix='solver="cp_sat"',
        )
    return solution_of(problem, descent)


def _minimize(search: Search, hint: Mapping[str, str] | None) -> Level:
    _, level = start(search, hint, alone=True)
    met = level.assignment is not None and relative_gap(level.value, level.bound) <= TOLERANCE
    return Level(level.assignment, level.value, level.bound, ended=met)
