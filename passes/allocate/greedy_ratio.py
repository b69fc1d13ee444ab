"""from the first option of all: repeatedly the move with the largest saving / measured loss

Greedy mixed precision of MPTQ-ViT (arXiv 2401.14895), a reconstruction: only the abstract is
public, which names performance and compressibility.  A move gives a group an option that costs
less.  Its ratio begins as what the tables predict and is measured when it is the largest; it is
taken if it then still is (lazy greedy).  So a step asks for few plans, and takes the move that
asking for all would take wherever ratios only fall.  A move that is not allowed is finished: it is
never tried again.

Saved is, until all budgets are met, what is saved of their excess, in shares of the budgets; after
that, of the objective.  If the error is the objective, nothing is left to save then.  What two
groups have in common (a weight that both read) counts for each of them there: no step by itself
saves it.  So a step may cost what only a later one makes up for, and the best plan is kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from mpq_fx.passes.allocate.groups import groups_of
from mpq_fx.passes.allocate.problem import (
    ERROR,
    Problem,
    coupling_of,
    table_of,
    value_of,
    within,
)
from mpq_fx.passes.allocate.search import (
    Candidate,
    Evaluator,
    Plan,
    Search,
    candidate_of,
    check_budgets_alone,
    unmeant,
)

if TYPE_CHECKING:
    from mpq_fx.config import Config


class Move(NamedTuple):
    """A group, by its first unit, and the option that it would take."""

    group: str
    option: str


Terms = Mapping[tuple[str, str], Mapping[tuple[str, str], float]]


@dataclass(frozen=True)
class Changes:
    """What a move adds to a quantity, looked up where it makes a difference."""

    problem: Problem
    members: Mapping[str, tuple[str, ...]]
    terms: Mapping[str, Terms]  # quantity, unit and option -> other unit and its option -> term

    def after(self, plan: Plan, move: Move) -> dict[str, str]:
        return {**plan, **dict.fromkeys(self.members[move.group], move.option)}

    def of(self, name: str, plan: Plan, move: Move) -> float:
        """value(plan after the move) − value(plan)"""
        units = self.members[move.group]
        return self._at(name, self.after(plan, move), units) - self._at(name, plan, units)

    def _at(self, name: str, plan: Plan, units: tuple[str, ...]) -> float:
        """The part of a quantity in which some units have a say."""
        table, terms = table_of(self.problem, name), self.terms[name]
        total = math.fsum(table[unit, plan[unit]] for unit in units)
        for k, unit in enumerate(units):
            near = terms.get((unit, plan[unit]))
            if near:
                total += sum(near.get(at, 0.0) for at in plan.items() if at[0] not in units[:k])
        return total


def changes_of(problem: Problem, members: Mapping[str, tuple[str, ...]]) -> Changes:
    found: dict[str, dict[tuple[str, str], dict[tuple[str, str], float]]] = {}
    for name in (ERROR, *problem.resources):
        terms = found.setdefault(name, {})
        for (u, o, v, p), term in coupling_of(problem, name).items():
            for one, other in (((u, o), (v, p)), ((v, p), (u, o))):
                near = terms.setdefault(one, {})
                near[other] = near.get(other, 0.0) + term
    return Changes(problem, members, found)


def without_credits(problem: Problem) -> Problem:
    """The resources without what choices have in common: terms of pairs below 0."""
    dear = {n: {at: t for at, t in terms.items() if t > 0.0} for n, terms in problem.edges.items()}
    return replace(problem, edges=dear)


@dataclass
class _State:
    """The plan so far, the moves that are not finished, and what those lost that were asked for."""

    plan: dict[str, str]
    moves: list[Move]
    apart: Changes  # of the resources without credits: what a move is said to save
    losses: dict[Move, float] = field(default_factory=dict)  # beside the plan of that time


def greedy_ratio(problem: Problem, evaluator: Evaluator) -> Candidate | None:
    """The best plan after an allowed move: the last, unless credits made another cheaper.

    Once time is over nothing more is asked for: budgets that are not met yet are met by prediction.
    """
    check_budgets_alone(problem)
    begin = time.perf_counter()
    groups = groups_of(problem)
    members = {g.members[0]: g.members for g in groups}
    changes, apart = (changes_of(p, members) for p in (problem, without_credits(problem)))
    moves = [Move(g.members[0], o) for g in groups for o in g.options[1:]]
    state = _State({u: g.options[0] for g in groups for u in g.members}, moves, apart)
    best = state.plan
    while (move := _next(changes, evaluator, state)) is not None:
        state.plan = changes.after(state.plan, move)
        state.losses = {m: lost for m, lost in state.losses.items() if m.group != move.group}
        best = min(state.plan, best, key=partial(_rank, problem))
    if _unmet(problem, best):
        evaluator.solve(problem)  # raises where no plan meets the budgets, and says why
    return candidate_of(problem, evaluator, best, time.perf_counter() - begin)


def _rank(problem: Problem, plan: Plan) -> tuple[bool, float]:
    """Plans that meet the budgets come first, the cheapest of them before all; of two that do not
    the one that was reached later, which is the one that is asked about first.
    """
    is_unmet, name = bool(_unmet(problem, plan)), problem.objective[0]
    return is_unmet, 0.0 if is_unmet or name == ERROR else value_of(problem, name, plan)


def _next(changes: Changes, evaluator: Evaluator, state: _State) -> Move | None:
    """The move whose measured ratio is the largest; what is not allowed is finished."""
    unmet = _unmet(changes.problem, state.plan)
    saved = dict(_savings(changes, state, unmet))
    unit = evaluator.yardstick**2 or 1.0
    predicted = {move: changes.of(ERROR, state.plan, move) / unit for move in saved}

    def ratio(move: Move) -> tuple[float, float]:
        """As measured, if it was; among equals as the tables predict."""
        lost = state.losses.get(move, predicted[move])
        return _over(saved[move], lost), _over(saved[move], predicted[move])

    asked: set[Move] = set()
    while saved:
        move = max(saved, key=ratio)
        if move in asked or (unmet and evaluator.is_past()):
            return move
        if evaluator.is_past():
            return None
        after = changes.after(state.plan, move)
        asked.add(move)
        state.losses[move] = _loss(evaluator, after) - _loss(evaluator, state.plan)
        if evaluator.error(after) > evaluator.limit:
            state.moves.remove(move)
            del saved[move]
    return None


def _unmet(problem: Problem, plan: Plan) -> dict[str, float]:
    """budget -> how much the plan is above it"""
    used = {name: value_of(problem, name, plan) for name in problem.budgets}
    limits = problem.budgets
    return {n: at - limits[n] for n, at in used.items() if not within(at, limits[n])}


def _savings(
    changes: Changes, state: _State, unmet: Mapping[str, float]
) -> Iterator[tuple[Move, float]]:
    """Moves that save something, and break no budget that is met."""
    problem, plan = changes.problem, state.plan
    if not unmet and problem.objective[0] == ERROR:
        return
    met = {n: value_of(problem, n, plan) for n in problem.budgets if n not in unmet}
    for move in state.moves:
        if any(
            not within(used + changes.of(name, plan, move), problem.budgets[name])
            for name, used in met.items()
        ):
            continue
        saved = -state.apart.of(problem.objective[0], plan, move)
        if unmet:
            parts = {name: min(-state.apart.of(name, plan, move), unmet[name]) for name in unmet}
            saved = sum(part / (problem.budgets[name] or 1.0) for name, part in parts.items())
        if saved > 0.0:
            yield move, saved


def _over(saved: float, lost: float) -> float:
    """The ratio; inf where nothing is lost."""
    return saved / lost if lost > 0.0 else math.inf


def _loss(evaluator: Evaluator, plan: Plan) -> float:
    """What a plan loses of what is allowed; without a limit in the measure of the tables."""
    limit = evaluator.limit if 0.0 < evaluator.limit < math.inf else 1.0
    return (evaluator.error(plan) / limit) ** evaluator.exponent


def refuse(config: Config) -> Iterator[str]:
    """It goes down, and what a move changes is a sum."""
    yield from unmeant(config, ("min_bits", "max_activation_memory"))


GREEDY_RATIO = Search(greedy_ratio, refuse)
