"""min value(name)  s.t.  value(at) <= limits[at]: integers in CP-SAT, checked in floats."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from mpq_fx.passes.allocate.exact import Form, drop_dominated, keep
from mpq_fx.passes.allocate.groups import is_agreed
from mpq_fx.passes.allocate.joined import joined
from mpq_fx.passes.allocate.messages import relax_pairs
from mpq_fx.passes.allocate.model import WORK_PER_SECOND, Clock, Run, Task, run
from mpq_fx.passes.allocate.problem import (
    TOLERANCE,
    Problem,
    meets,
    relative_gap,
    value_of,
)
from mpq_fx.passes.allocate.relaxation import Relaxation, relax
from mpq_fx.passes.allocate.rows import can_exceed, row_of, rows_of

# ortools 9.15 proved a wrong optimum in 1 of 3,439 random models with pairs whose coefficients had
# 40 bits (other presolve settings fail on other models), and in none of 4,205 with 30 bits.
BITS = 30
FEW = 10_000  # plans, which CP-SAT alone goes through quicker
SHARE = 0.3  # of the time limit for the relaxation
ROUNDS = 400  # of cutting off one plan, times units: worth it where a plan is one of few


@dataclass(frozen=True)
class Level:
    """The smallest value found, a lower bound of it in floats, and whether the search was ended.

    No assignment: there is none (`ended`), or none was found in time (not `ended`).
    """

    assignment: Mapping[str, str] | None
    value: float
    bound: float
    ended: bool
    scale: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Search:
    """What stays the same while one quantity is minimized."""

    problem: Problem
    form: Form
    name: str
    limits: Mapping[str, float]
    clock: Clock

    def value(self, assignment: Mapping[str, str]) -> float:
        return value_of(self.problem, self.name, assignment)

    def best(self, plans: Iterable[Mapping[str, str] | None]) -> Mapping[str, str] | None:
        """The cheapest of the plans that agree in links and meet the limits in floats, and are not
        excluded.
        """
        known = self.problem.excluded
        found = [p for p in plans if p is not None and dict(p) not in known]
        agreed = [p for p in found if is_agreed(self.problem, p)]
        good = [p for p in agreed if meets(self.problem, self.limits, p)]
        return min(good, key=self.value, default=None)

    @property
    def excluded(self) -> tuple[tuple[int, ...], ...]:
        """The excluded plans by index.  One with an option that was dropped cannot come up, nor one
        whose tied units differ, which by index would be another plan.
        """
        whole = (plan for plan in self.problem.excluded if _is_plan(self.form, plan))
        found = (self.form.picks(plan) for plan in whole)
        return tuple(tuple(i for i in picks if i is not None) for picks in found)


def minimize(search: Search, hint: Mapping[str, str] | None = None) -> Level:
    """min value(name)  s.t.  value(at) <= limits[at], up to a relative 1e-9.

    Rows rounded down admit every plan that floats admit, so "infeasible" and bounds are proofs.
    Each answer is cut off: it was admitted by rounding only, or it is known by now, and the next
    run looks for a better one that rounding hides.  Cutting ends after a few rounds in large
    problems; then rows rounded up, which admit fewer plans than floats do, find one.
    """
    search, level = start(search, hint)
    hints = search.form.picks(level.assignment or hint or {})
    cuts = search.excluded
    rounds = len(cuts) + 2 + ROUNDS // max(len(search.form.groups), 1)
    while len(cuts) < rounds and not _is_met(level):
        task = _task(search, level, cuts, hints)
        found = run(task, search.clock)
        level = _learned(search, level, task, found)
        if found.outcome != "OPTIMAL":
            return _unfinished(search, level, hints)
        cuts = (*cuts, found.picks)
    return replace(level, ended=True) if _is_met(level) else _rounded_up(search, level, hints)


def _unfinished(search: Search, level: Level, hints: tuple[int | None, ...]) -> Level:
    """What there is where CP-SAT proved it, or ran out of time: then few plans, not relaxed before,
    are now.
    """
    if _has_few(search.form) and not _is_met(level):
        _, late = start(search, level.assignment, alone=True)
        better = late if late.value < level.value else level
        level = replace(better, bound=min(max(level.bound, late.bound), better.value))
    return level if level.assignment else _rounded_up(search, level, hints)


def _is_met(level: Level) -> bool:
    return level.assignment is not None and relative_gap(level.value, level.bound) <= TOLERANCE


def start(
    search: Search, hint: Mapping[str, str] | None, *, alone: bool = False
) -> tuple[Search, Level]:
    """Fewer options, a first plan and a bound, before CP-SAT sees the problem, or `alone`."""
    hinted = hint if hint is not None and _is_plan(search.form, hint) else None
    tight = _tight(search)
    form = tight if search.problem.excluded else drop_dominated(tight)
    relaxed = _relaxed(search, form, alone=alone)
    picks = None if relaxed is None else relaxed.picks
    plan = search.best([hinted, None if picks is None else form.assignment(picks)])
    value = math.inf if plan is None else search.value(plan)
    if relaxed is None:
        return replace(search, form=form), Level(plan, value, -math.inf, ended=False)
    bound = min(relaxed.bound, value)
    if plan is not None:
        most = value - bound + TOLERANCE * max(abs(value), abs(bound))
        form = keep(form, lambda g, i: bool(relaxed.extra[g, i] <= most))
    return replace(search, form=form), Level(plan, value, bound, ended=False)


def _tight(search: Search) -> Form:
    """The form without what no assignment exceeds, of quantities that are limited and no more."""
    quantities = {
        name: parts
        if name == search.name or name not in search.limits
        else tuple(part for part in parts if can_exceed(part, search.limits[name]))
        for name, parts in search.form.quantities.items()
    }
    return replace(search.form, quantities=quantities)


def _relaxed(search: Search, form: Form, *, alone: bool) -> Relaxation | None:
    """The relaxation, unless it would take longer than the CP-SAT that follows."""
    if _has_few(form) and not alone:
        return None
    whole = joined(form)
    if not form.is_coupled:
        return whole.apart(relax(whole.form, search.name, search.limits))
    seconds = search.clock.limit * SHARE
    found = relax_pairs(whole.form, search.name, search.limits, seconds=seconds)
    return whole.apart(found)


def _has_few(form: Form) -> bool:
    return form.is_coupled and math.prod(len(group.options) for group in form.groups) <= FEW


def _is_plan(form: Form, hint: Mapping[str, str]) -> bool:
    picks = [pick for pick in form.picks(hint) if pick is not None]
    return len(picks) == len(form.groups) and form.assignment(picks) == dict(hint)


def _task(
    search: Search,
    level: Level,
    cuts: tuple[tuple[int, ...], ...],
    hints: tuple[int | None, ...],
    *,
    up: bool = False,
) -> Task:
    """The integers of one run; what a known plan costs makes the objective's scale finer."""
    form, limits = search.form, search.limits
    most = min(level.value, limits.get(search.name, math.inf))
    goal = rows_of(form.quantities[search.name], None if math.isinf(most) else most, bits=BITS)
    rows = {
        name: tuple(
            row_of(part, at, bits=BITS, up=up)
            for part in form.quantities[name]
            if can_exceed(part, at)
        )
        for name, at in limits.items()
    }
    sizes = tuple(len(group.options) for group in form.groups)
    return Task(sizes, goal, rows, form.links, cuts, hints)


def _learned(search: Search, level: Level, task: Task, found: Run) -> Level:
    """The level after a run: a better plan, a better bound, or the end of the search."""
    goal = task.objective[0]
    scale = {n: min(row.scale for row in rows) for n, rows in task.rows.items() if rows}
    level = replace(level, scale={**scale, search.name: goal.scale})
    if found.outcome == "INFEASIBLE":
        return replace(level, bound=level.value, ended=True)
    bound = max(level.bound, goal.bound(found.least))
    plan = search.best([search.form.assignment(found.picks)] if found.picks else [])
    if plan is not None and search.value(plan) < level.value:
        level = replace(level, assignment=plan, value=search.value(plan))
    ended = level.ended or (plan is not None and found.outcome == "OPTIMAL")
    return replace(level, bound=min(bound, level.value), ended=ended)


def _rounded_up(search: Search, level: Level, hints: tuple[int | None, ...]) -> Level:
    """A plan where the rounded-down rows gave none: no proof, so the bound stays what it was."""
    if level.ended:
        return level
    clock = Clock(max(search.clock.limit / 4, search.clock.left / WORK_PER_SECOND))
    found = run(_task(search, level, search.excluded, hints, up=True), clock)
    plan = search.best([search.form.assignment(found.picks)] if found.picks else [])
    if plan is None or search.value(plan) >= level.value:
        return level
    return replace(level, assignment=plan, value=search.value(plan))
