"""An evaluator whose errors are a function of the plan, as a search asks it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mpq_fx.passes.allocate import Evaluator, Problem, cp_sat, value_of
from mpq_fx.passes.allocate.search import remembered


def flat(shares: Mapping[Any, float], call: int) -> tuple[float, Mapping[Any, float]]:
    """Nothing depends on anything."""
    return 0.0, dict.fromkeys(shares, 0.0)


def evaluator_of(error: Callable[[Any], float], limit: float, **options: Any) -> Evaluator:
    given = {"yardstick": limit, "exponent": 2, "gradient": flat, "solve": cp_sat.solve}
    given |= {"is_past": lambda share=1.0: False, **options}
    return Evaluator(error=remembered(error), limit=limit, **given)


def predicted(problem: Problem, limit: float, **options: Any) -> Evaluator:
    """The tables tell the truth: error = √ noise; the gradient is that of the noise."""

    def gradient(shares: Mapping[Any, float], call: int) -> tuple[float, Mapping[Any, float]]:
        derivative = {key: problem.error[key] for key in shares}
        noise = sum(derivative[key] * share for key, share in shares.items())
        for (u, o, v, p), term in problem.pairs.items():
            one, two = shares.get((u, o), 0.0), shares.get((v, p), 0.0)
            noise += term * one * two
            if (u, o) in shares:
                derivative[u, o] += term * two
            if (v, p) in shares:
                derivative[v, p] += term * one
        return noise, derivative

    def error(plan: Mapping[str, str]) -> float:
        return max(value_of(problem, "error", plan), 0.0) ** 0.5

    return evaluator_of(error, limit, **{"gradient": gradient, **options})
