"""tables -> the assignment that is fastest (or smallest) among those whose *measured* error is allowed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mpq_fx.clock import Clock
from mpq_fx.config import Config
from mpq_fx.errors import InfeasibleError
from mpq_fx.measure import Measured, parse
from mpq_fx.passes.allocate import SOLVERS, Solution
from mpq_fx.passes.analyze.replay import output_error
from mpq_fx.problem import numbers, problem
from mpq_fx.verify import Candidate, bisect

SOLVER, SOLVE_SECONDS = "cp_sat", 5.0


@dataclass(frozen=True)
class Found:
    """The outcome of the search: a plan's assignment and the budgets it was found under."""

    candidate: Candidate
    budgets: Mapping[str, float]
    baseline: Mapping[str, float]


def search(measured: Measured, config: Config, clock: Clock) -> Found:
    """Solve and measure in turn until the joint error on the choose part meets the tolerance.

    Raises InfeasibleError when budgets cannot be met at an allowed error.
    """
    baseline = float_baseline(measured)
    budgets = numbers(config, baseline)
    if measured.tolerance is not None:
        budgets["tolerance"] = measured.tolerance
    with clock.stage("solve and verify"):
        candidate = _search(measured, config, clock, budgets, baseline)
    return Found(candidate, budgets, baseline)


def joint_error(measured: Measured, assignment: Mapping[str, str]) -> float:
    """Error of a whole assignment, replayed on the choose part; the worst of its calls."""
    choices = parse(measured.proposal, assignment)
    errors = [output_error(measured.replay.run(record, choices), reference, measured.excluded)
              for record, reference in zip(measured.parts.choose, measured.references, strict=True)]
    return max(errors)


def float_baseline(measured: Measured) -> dict[str, float]:
    """What the float model uses in all: the sum over sites and, of bytes, every other parameter."""
    first = {unit: kept[0].name for unit, kept in measured.proposal.options.items()}
    sums = {name: sum(table.values[key] for key in first.items())
            for name, table in measured.tables.items() if name != "error"}
    weights = {site.weight for site in measured.sites}
    others = sum(t.numel() * t.element_size() for name, t in measured.values.items()
                 if name not in weights)
    numel = sum(site.weight_numel for site in measured.sites)
    return {**sums, "size": sums["size"] + others, "weights": float(numel)}


def _search(measured: Measured, config: Config, clock: Clock, budgets: Mapping[str, float],
            baseline: Mapping[str, float]) -> Candidate:
    def solution(error_budget: float | None) -> Solution:
        tolerance = budgets.get("tolerance")
        scale = 1.0 if error_budget is None or not tolerance else error_budget / tolerance**2
        return SOLVERS[SOLVER](problem(measured.tables, objective=config.objective, budgets=budgets,
                             baseline=baseline, ties=measured.ties, scale=scale),
                     time_limit=SOLVE_SECONDS)

    if measured.tolerance is None or not measured.sites:
        found = solution(None)
        return Candidate(found, joint_error(measured, found.assignment), 1.0)
    best = bisect(solution, lambda a: joint_error(measured, a), measured.tolerance,
                  is_past=lambda: clock.is_past(0.7))
    if best is None:
        raise InfeasibleError(
            f"no plan that was tried has an error of at most {measured.tolerance:.3g} under the "
            f"budgets {dict(budgets)}", fix='raise the tolerance, or a budget')
    return best
