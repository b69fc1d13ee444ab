"""problem, evaluator -> the least sensitive units lowered first, as far as the evaluator allows

The order is that of the inter-layer augmented Hessian where the error table has pairs, and that of
the single errors where it has none; the searches are those of `ordered`.  The menu goes from the
option that saves least to the one that saves most, in the mean over the units that have it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING

from mpq_fx.passes.allocate.groups import groups_of
from mpq_fx.passes.allocate.ordered import (
    Assignment,
    IsAllowed,
    Order,
    bisection,
    greedy,
    incremental_order,
)
from mpq_fx.passes.allocate.problem import Problem, table_of
from mpq_fx.passes.allocate.search import Candidate, Evaluator, Search, candidate_of, check_unlinked

if TYPE_CHECKING:
    from mpq_fx.config import Config

Ordered = Callable[[Assignment, Sequence[str], Order, IsAllowed], Assignment]


def guided(search: Ordered, problem: Problem, evaluator: Evaluator) -> Candidate | None:
    """The assignment that a search of `ordered` ends with; it was allowed, or is where it started.

    Knows neither budgets, floors nor edges; links are refused.
    """
    begin = time.perf_counter()
    check_unlinked(problem)
    members = {group.members[0]: group.members for group in groups_of(problem)}
    start = {unit: problem.options[unit][0] for unit in members}

    def whole(found: Mapping[str, str]) -> dict[str, str]:
        return {unit: found[first] for first, tied in members.items() for unit in tied}

    def order(candidates: Sequence[str], found: Assignment, option: str) -> list[str]:
        able = [unit for unit in candidates if _saves(problem, members[unit], found[unit], option)]
        return _least_sensitive(problem, members, able, whole(found), option)

    menu = menu_of(problem, start)
    found = search(start, menu, order, lambda a: evaluator.allows(whole(a)))
    return candidate_of(problem, evaluator, whole(found), time.perf_counter() - begin)


def refuse(config: Config) -> Iterator[str]:
    """Only a limit of the error can be kept."""
    if config.budgets or config.tolerance is None:
        given = ", ".join(config.budgets) or "tolerance=None"
        yield f"knows a tolerance and no other budget, and there is {given}"


BISECTION = Search(partial(guided, bisection), refuse)
GREEDY = Search(partial(guided, greedy), refuse)


def menu_of(problem: Problem, start: Mapping[str, str]) -> list[str]:
    """Options by the mean share that they cost of the first one, the largest first; all below 1."""
    costs = table_of(problem, problem.objective[0])
    shares: dict[str, list[float]] = {}
    for unit, first in start.items():
        for option in problem.options[unit][1:]:
            if costs[unit, first] > 0.0:
                shares.setdefault(option, []).append(costs[unit, option] / costs[unit, first])
    means = {option: fmean(seen) for option, seen in shares.items()}
    return sorted((o for o in means if means[o] < 1.0), key=means.__getitem__, reverse=True)


def _saves(problem: Problem, tied: Sequence[str], now: str, option: str) -> bool:
    """Do all units of a tie offer an option that costs less than what they have?"""
    if any(option not in problem.options[unit] for unit in tied):
        return False
    costs = table_of(problem, problem.objective[0])
    return sum(costs[unit, option] - costs[unit, now] for unit in tied) < 0.0


def _least_sensitive(
    problem: Problem,
    members: Mapping[str, Sequence[str]],
    candidates: Sequence[str],
    found: Mapping[str, str],
    option: str,
) -> list[str]:
    """The incremental order of the rise of the error, beside what the other units have already.

    A candidate's choice is found + m · (option − found), m in {0, 1}: what a pair adds is a
    polynomial in m, whose linear terms count for a unit alone.
    """
    leader = {unit: first for first, tied in members.items() for unit in tied}
    alone = {
        first: sum(problem.error[u, option] - problem.error[u, found[u]] for u in members[first])
        for first in candidates
    }

    def taken(unit: str, choice: str) -> tuple[int, int]:
        """(a, b): a + b · m is 1 where the unit has this choice, and 0 elsewhere."""
        is_now = choice == found[unit]
        if leader[unit] not in alone:
            return int(is_now), 0
        return int(is_now), int(choice == option) - int(is_now)

    both: dict[tuple[str, str], float] = {}
    for (u, o, v, p), term in problem.pairs.items():
        (a, b), (c, d) = taken(u, o), taken(v, p)
        first, second = leader[u], leader[v]
        if b and c:
            alone[first] += term * b * c
        if a and d:
            alone[second] += term * a * d
        if b and d and first == second:
            alone[first] += term * b * d
        elif b and d:
            both[first, second] = both.get((first, second), 0.0) + term * b * d
    return incremental_order(candidates, alone, both)
