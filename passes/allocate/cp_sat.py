"""min objective[0], then objective[1], …   s.t. budgets, ties, forced choices: exact, by CP-SAT."""

from __future__ import annotations

from collections.abc import Mapping

from mpq_fx.errors import ConfigError
from mpq_fx.passes.allocate.infeasible import explain
from mpq_fx.passes.allocate.lexicographic import descend, solution_of
from mpq_fx.passes.allocate.minimize import minimize
from mpq_fx.passes.allocate.problem import Problem, Solution


def solve(
    problem: Problem, *, time_limit: float = 10.0, hint: Mapping[str, str] | None = None
) -> Solution:
    """The best assignment, or the best found in time (status FEASIBLE, with its gap).

    Deterministic: the limit is one of work, about `time_limit` seconds of one core.
    InfeasibleError is a proof; a search that ends with neither plan nor proof is a ConfigError
    about `time_limit`.
    """
    descent = descend(problem, minimize, time_limit, hint)
    last = descent.levels[-1]
    if last.assignment is None and last.ended:
        raise explain(problem, time_limit=time_limit)
    if last.assignment is None:
        raise ConfigError(
            f"no plan was found in {time_limit} s; the budgets are not proved to be out of reach",
            fix=f"time_limit={10 * time_limit:g}, or larger budgets",
        )
    return solution_of(problem, descent)
