"""plan -> Front: what can be traded for what, without the points that others beat"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpq_fx.facts import Plan
from mpq_fx.resolve import OBJECTIVES

EXACT = {"tolerance": 1e-30}  # a point without any error: a tolerance is above 0
Point = Mapping[str, Any]  # resource, latency, size, …, error, perhaps measured, options


@dataclass(frozen=True)
class Front:
    """Trade-offs of a model, by resource and then by what they cost; str() is a table."""

    plan: Plan  # the one that was tuned: its tables hold all that the points come from
    points: tuple[Point, ...]

    def plan_at(self, point: Point) -> Plan:
        """The plan of one point, solved again from the stored tables."""
        return self.plan.resolve(**(point["options"] or EXACT))

    def __str__(self) -> str:
        lines = [f"{'':8} {'ms':>8} {'MB':>8} {'error':>8} {'measured':>8}  options"]
        lines += [_line(point) for point in self.points]
        return "\n".join(lines)


def front_of(plan: Plan) -> Front:
    return Front(plan, tuple(p for name in OBJECTIVES for p in undominated(plan.points, name)))


def undominated(points: Sequence[Point], resource: str) -> list[Point]:
    """Of one resource, cheapest first: each is more exact than all that cost less."""
    found: list[Point] = []
    mine = [point for point in points if point["resource"] == resource]
    for point in sorted(mine, key=lambda p: (p[resource], seen_error(p))):
        if not found or seen_error(point) < seen_error(found[-1]):
            found.append(point)
    return found


def seen_error(point: Point) -> float:
    """The measured error of a point, else the predicted one."""
    return point.get("measured", point["error"])


def _line(point: Point) -> str:
    measured = f"{point['measured']:8.3g}" if "measured" in point else f"{'–':>8}"
    numbers = f"{point['latency']:8.3g} {point['size'] / 1e6:8.3g} {point['error']:8.3g}"
    return f"{point['resource']:8} {numbers} {measured}  {point['options']}"
