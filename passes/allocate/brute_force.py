"""min over every assignment there is: the oracle of the other solvers, for small problems."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping

from mpq_fx.errors import ConfigError, InfeasibleError
from mpq_fx.passes.allocate.problem import (
    Problem,
    Solution,
    is_feasible,
    limits_of,
    value_of,
    values_of,
    within,
)

LARGEST = 1 << 20


def solve(
    problem: Problem, *, time_limit: float = 10.0, hint: Mapping[str, str] | None = None
) -> Solution:
    """Every assignment, filtered by what is limited, then by one objective after the other.

    `time_limit` and `hint` are those of every solver; the answer depends on neither.
    """
    started = time.perf_counter()
    count = math.prod(len(offers) for offers in problem.options.values())
    if count > LARGEST:
        raise ConfigError(f"brute force would try {count} assignments", fix='solver="cp_sat"')
    every = itertools.product(*problem.options.values())
    plans = [dict(zip(problem.options, picks, strict=True)) for picks in every]
    plans = [plan for plan in plans if is_feasible(problem, plan)]
    if not plans:
        raise InfeasibleError(f"none of {count} assignments meets {limits_of(problem)}")
    bounds = {}
    for name in problem.objective:
        values = [value_of(problem, name, plan) for plan in plans]
        bounds[name] = min(values)
        plans = [p for p, v in zip(plans, values, strict=True) if within(v, bounds[name])]
    return Solution(
        assignment=plans[0],
        values=values_of(problem, plans[0]),
        status="OPTIMAL",
        objective=problem.objective,
        bounds=bounds,
        seconds=time.perf_counter() - started,
    )
