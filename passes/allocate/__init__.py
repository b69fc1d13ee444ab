"""Plain tables in, one option per unit out; no tensors."""

from __future__ import annotations

from mpq_fx.passes.allocate import brute_force, cp_sat, lagrangian
from mpq_fx.passes.allocate.frontier import frontier
from mpq_fx.passes.allocate.greedy_ratio import GREEDY_RATIO
from mpq_fx.passes.allocate.guided import BISECTION, GREEDY
from mpq_fx.passes.allocate.infeasible import Diagnosis, diagnose, explain
from mpq_fx.passes.allocate.problem import Problem, Solution, is_feasible, value_of, values_of
from mpq_fx.passes.allocate.rco import RCO
from mpq_fx.passes.allocate.rescaled import RESCALED
from mpq_fx.passes.allocate.search import Candidate, Evaluator, Search, Solver
from mpq_fx.plugins import Catalog

SOLVERS: Catalog[Solver] = Catalog(
    "solvers",
    {
        "cp_sat": cp_sat.solve,  # exact; the default
        "lagrangian": lagrangian.solve,  # no pair terms; near-optimal in a bounded number of steps
        "brute_force": brute_force.solve,  # the oracle, for small problems
    },
)

SEARCHES: Catalog[Search] = Catalog(
    "searches",
    {
        "solver": RESCALED,  # the default: solve, measure, rescale the error budget, solve again
        "bisection": BISECTION,  # the longest prefix of the sensitivity-guided order
        "greedy": GREEDY,  # one by one in that order
        "greedy_ratio": GREEDY_RATIO,  # what saves most for what it loses, one by one
        "rco": RCO,  # gradient of option logits on the manifold of one budget
    },
)

__all__ = [
    "SEARCHES",
    "SOLVERS",
    "Candidate",
    "Diagnosis",
    "Evaluator",
    "Problem",
    "Search",
    "Solution",
    "Solver",
    "diagnose",
    "explain",
    "frontier",
    "is_feasible",
    "value_of",
    "values_of",
]
