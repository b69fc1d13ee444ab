"""Plain tables in, one option per unit out; no tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from mpq_fx.passes.allocate import brute_force, cp_sat, lagrangian
from mpq_fx.passes.allocate.frontier import frontier
from mpq_fx.passes.allocate.infeasible import Diagnosis, diagnose, explain
from mpq_fx.passes.allocate.problem import Problem, Solution, is_feasible, value_of, values_of
from mpq_fx.plugins import Catalog


class Solver(Protocol):
    """Problem -> Solution, or InfeasibleError."""

    def __call__(
        self, problem: Problem, *, time_limit: float = 10.0, hint: Mapping[str, str] | None = None
    ) -> Solution: ...


SOLVERS: Catalog[Solver] = Catalog(
    "solvers",
    {
        "cp_sat": cp_sat.solve,  # exact; the default
        "lagrangian": lagrangian.solve,  # no pair terms; near-optimal in a bounded number of steps
        "brute_force": brute_force.solve,  # the oracle, for small problems
    },
)

__all__ = [
    "SOLVERS",
    "Diagnosis",
    "Problem",
    "Solution",
    "Solver",
    "diagnose",
    "explain",
    "frontier",
    "is_feasible",
    "value_of",
    "values_of",
]
