"""min q1, then min q2 s.t. q1 <= its minimum, …, given any way to minimize one quantity."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mpq_fx.errors import ConfigError
from mpq_fx.passes.allocate.exact import form_of
from mpq_fx.passes.allocate.minimize import Level, Search
from mpq_fx.passes.allocate.model import Clock
from mpq_fx.passes.allocate.problem import Problem, Solution, is_feasible, limits_of, values_of

Minimize = Callable[[Search, Mapping[str, str] | None], Level]


@dataclass(frozen=True)
class Descent:
    """The levels that were solved; the last has no assignment if the search failed there."""

    levels: tuple[Level, ...]
    seconds: float


def descend(
    problem: Problem, minimize: Minimize, time_limit: float, hint: Mapping[str, str] | None
) -> Descent:
    """One level per objective; each level's value limits the levels after it."""
    if not time_limit > 0:
        raise ConfigError(f"time_limit is {time_limit}", fix="time_limit=10.0, in seconds")
    form, limits, clock = form_of(problem), limits_of(problem), Clock(time_limit)
    plan, levels = hint, ()
    for name in problem.objective:
        level = minimize(Search(problem, form, name, limits, clock), plan)
        levels = (*levels, level)
        if level.assignment is None:
            break
        plan, limits[name] = level.assignment, min(level.value, limits.get(name, level.value))
    return Descent(levels, clock.seconds)


def solution_of(problem: Problem, descent: Descent) -> Solution:
    """The last level's plan, with the values of the original float tables."""
    last = descent.levels[-1].assignment
    assert last is not None, "a descent that failed has no solution"
    assert is_feasible(problem, last), f"the plan breaks a budget: {last}"
    ended = all(level.ended for level in descent.levels)
    scales: dict[str, float] = {}
    for level in descent.levels:
        scales.update(level.scale)
    named = zip(problem.objective, descent.levels, strict=True)
    return Solution(
        assignment=last,
        values=values_of(problem, last),
        status="OPTIMAL" if ended else "FEASIBLE",
        objective=problem.objective,
        bounds={name: level.bound for name, level in named},
        seconds=descent.seconds,
        scale=scales,
    )
