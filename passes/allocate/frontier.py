"""{(resource(a), error(a))}: no other plan is better in one and as good in the other."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mpq_fx.errors import ConfigError
from mpq_fx.passes.allocate.cp_sat import solve
from mpq_fx.passes.allocate.problem import ERROR, Problem, Solution, within


@dataclass(frozen=True)
class _Gap:
    """Unexplored budgets low..high between two neighbors of the frontier."""

    left: Solution
    right: Solution
    low: float
    high: float

    @property
    def area(self) -> float:
        """How much a point in the gap can still gain."""
        return (self.high - self.low) * (self.left.values[ERROR] - self.right.values[ERROR])


def frontier(
    problem: Problem, resource: str, points: int = 9, time_limit: float = 10.0
) -> tuple[Solution, ...]:
    """Up to `points` non-dominated plans, by growing `resource`, both ends included.

    The budgets of "error" and `resource` are lifted: the frontier shows what lies beyond them.
    All others are kept.  The largest gap is split next, so few points tell the shape.
    """
    if points < 2:
        raise ConfigError(f"a frontier has two ends, but points is {points}", fix="points=9")
    kept = {n: at for n, at in problem.budgets.items() if n not in (ERROR, resource)}
    share = time_limit / (2 * points)
    cheap = replace(problem, budgets=kept, objective=(resource, ERROR))
    exact = replace(problem, budgets=kept, objective=(ERROR, resource))
    left = solve(cheap, time_limit=share)
    right = solve(exact, time_limit=share, hint=left.assignment)
    found = [left, right]
    gaps = [_Gap(left, right, left.values[resource], right.values[resource])]
    for _ in range(2 * points - 2):
        gaps = [gap for gap in gaps if not within(gap.high, gap.low)]
        if len(found) >= points or not gaps:
            break
        widest = max(gaps, key=lambda gap: gap.area)
        middle = (widest.low + widest.high) / 2
        split = replace(exact, budgets={**kept, resource: middle})
        middle_plan = solve(split, time_limit=share, hint=widest.left.assignment)
        gaps.remove(widest)
        gaps += _halves(widest, middle_plan, middle, resource)
        found.append(middle_plan)
    return _non_dominated(found, resource)


def _halves(gap: _Gap, plan: Solution, middle: float, resource: str) -> list[_Gap]:
    """No better plan lies between the plan's own use and the budget that it was found under."""
    if within(gap.left.values[ERROR], plan.values[ERROR]):
        return [replace(gap, low=middle)]
    first = _Gap(gap.left, plan, gap.low, plan.values[resource])
    return [first, _Gap(plan, gap.right, middle, gap.high)]


def _non_dominated(found: list[Solution], resource: str) -> tuple[Solution, ...]:
    ordered = sorted(found, key=lambda s: (s.values[resource], s.values[ERROR]))
    kept: list[Solution] = []
    for solution in ordered:
        if not kept or not within(kept[-1].values[ERROR], solution.values[ERROR]):
            kept.append(solution)
    return tuple(kept)
