"""tables -> the assignment that is fastest (or smallest) among those whose *measured* error is
allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from mpq_fx.activation_memory import peak
from mpq_fx.clock import Clock
from mpq_fx.config import Config
from mpq_fx.errors import InfeasibleError
from mpq_fx.facts import Choice
from mpq_fx.measure import Measured, Record, parse
from mpq_fx.passes.allocate import SOLVERS, Problem, Solution
from mpq_fx.passes.allocate.guided import guided
from mpq_fx.passes.allocate.problem import ERROR, value_of
from mpq_fx.passes.allocate.refine import Tried, best_of, refined
from mpq_fx.passes.analyze.replay import Replayer, worst_error
from mpq_fx.problem import MEMORY, in_user_units, numbers, problem, unchanged, unreachable, words
from mpq_fx.verify import Candidate, bisect


@dataclass(frozen=True)
class Judge:
    """The user's own measure of a plan under test: how much worse it makes the model, and the
    limit.
    """

    drop: Callable[[Replayer, Mapping[str, Choice]], float]  # sites named as in the graph
    limit: float


SOLVE_SECONDS = 5.0
REFINE_SECONDS = 1.0  # of each solve with a corrected table: its answer need not be proved
REFINE_ROUNDS = 8
REFINE_SHARE = 0.4  # of the time budget, after which no further round begins


@dataclass(frozen=True)
class Found:
    """The outcome of the search: a plan's assignment and the budgets it was found under."""

    candidate: Candidate
    budgets: Mapping[str, float]
    baseline: Mapping[str, float]


def search(measured: Measured, config: Config, clock: Clock, judge: Judge | None = None) -> Found:
    """Solve and measure in turn until the joint error on the choose part meets the tolerance.

    Raises InfeasibleError when budgets cannot be met at an allowed error.
    """
    baseline = float_baseline(measured)
    budgets = numbers(config, baseline)
    if measured.tolerance is not None:
        budgets["tolerance"] = measured.tolerance
    with clock.stage("solve and verify"):
        candidate = _search(measured, config, clock, budgets, baseline, judge)
    return Found(candidate, budgets, baseline)


def joint_error(measured: Measured, assignment: Mapping[str, str]) -> float:
    """Error of a whole assignment, replayed on the choose part; the worst of its calls."""
    return replayed_error(measured, assignment, measured.parts.choose, measured.references)


def replayed_error(
    measured: Measured,
    assignment: Mapping[str, str],
    records: Sequence[Record],
    references: Sequence[Sequence[Any]],
) -> float:
    """Error of a whole assignment on some calls, the worst of them."""
    choices = parse(measured.proposal, assignment)
    runs = (measured.replay.run(record, choices) for record in records)
    return worst_error(runs, references, measured.excluded)


def drop(measured: Measured, judge: Judge, assignment: Mapping[str, str]) -> float:
    """How much of the user's metric an assignment loses."""
    return judge.drop(measured.replay, parse(measured.proposal, assignment))


def float_baseline(measured: Measured) -> dict[str, float]:
    """What the float model uses in all: the sum over sites and, of bytes, every other parameter."""
    first = {unit: kept[0].name for unit, kept in measured.proposal.options.items()}
    sums = {
        name: sum(table.values[key] for key in first.items())
        for name, table in measured.tables.items()
        if name != "error"
    }
    weights = {site.weight for site in measured.sites}
    others = sum(
        t.numel() * t.element_size() for name, t in measured.values.items() if name not in weights
    )
    numel = sum(site.weight_numel for site in measured.sites)
    ms = sums["latency"] if measured.float_ms is None else measured.float_ms
    whole = {"latency": ms, "size": sums["size"] + others, "weights": float(numel)}
    return {**sums, **whole, MEMORY: float(peak(measured.live, {}))}


def _search(
    measured: Measured,
    config: Config,
    clock: Clock,
    budgets: Mapping[str, float],
    baseline: Mapping[str, float],
    judge: Judge | None,
) -> Candidate:
    start = measured.tolerance if judge is None else measured.yardstick

    def solution(error_budget: float) -> Solution:
        limits = budgets if start is None else {**budgets, "tolerance": start}
        return _solved(measured, config, limits, baseline, _scale(error_budget, start))

    if not measured.sites or start == 0.0:
        found = solution(0.0)
        return Candidate(found, joint_error(measured, found.assignment), 1.0)
    if config.search != "solver":
        assert start is not None, "a Config with a search of a name has a tolerance"
        return _guided(measured, config, clock, baseline, start if judge is None else judge)
    if judge is None:
        best = _by_error(measured, config, clock, budgets, baseline, solution)
    else:
        best = bisect(
            solution, lambda s: drop(measured, judge, s.assignment), judge.limit, start=start or 1.0
        )
    if best is None:
        what = (
            f"an error of at most {start:.3g}" if judge is None else f"a drop of {judge.limit:.3g}"
        )
        named = " and ".join(words(n, value) for n, value in budgets.items() if n != "tolerance")
        raise InfeasibleError(
            f"no plan that was tried has {what}" + (f" with {named}" if named else ""),
            fix="raise the tolerance (or max_drop), or a budget",
        )
    return best


def _by_error(
    measured: Measured,
    config: Config,
    clock: Clock,
    budgets: Mapping[str, float],
    baseline: Mapping[str, float],
    solution: Callable[[float], Solution],
) -> Candidate | None:
    """Bisect the error budget, then search around the plan with a table that what was measured
    corrects.
    """
    tolerance, tried = measured.tolerance, list[Tried]()

    def measure(found: Solution) -> float:
        error = joint_error(measured, found.assignment)
        tried.append(Tried(found, error**2))
        return error

    if tolerance is None:
        found = solution(0.0)
        best = Candidate(found, measure(found), 1.0)
    else:
        past = partial(clock.is_past, 0.7)
        best = bisect(solution, measure, tolerance, start=tolerance, is_past=past)
    asked = _asked(measured, config, budgets, baseline, 1.0)
    return best and _refined(measured, config, clock, asked, best, tried)


def _refined(
    measured: Measured,
    config: Config,
    clock: Clock,
    asked: Problem,
    best: Candidate,
    tried: Sequence[Tried],
) -> Candidate:
    """The best after some rounds of solving with a corrected table; `best` if none is better."""
    hint = best.solution.assignment
    found = refined(
        asked,
        partial(SOLVERS.named(config.solver), time_limit=REFINE_SECONDS, hint=hint),
        lambda assignment: joint_error(measured, assignment) ** 2,
        tried,
        rounds=REFINE_ROUNDS,
        is_past=partial(clock.is_past, REFINE_SHARE),
    )
    winner = best_of(asked, found)
    if winner is None or winner.solution is best.solution:
        return best
    predicted = value_of(asked, ERROR, winner.solution.assignment)
    scale = predicted / winner.error if winner.error and predicted > 0 else best.scale
    return Candidate(winner.solution, winner.error**0.5, scale)


def _guided(
    measured: Measured,
    config: Config,
    clock: Clock,
    baseline: Mapping[str, float],
    limit: float | Judge,
) -> Candidate:
    """The search of the user's name, asking for measured errors, or for drops of the metric."""

    def worse_by(assignment: Mapping[str, str]) -> float:
        if isinstance(limit, Judge):
            return drop(measured, limit, assignment)
        return joint_error(measured, assignment)

    most = limit.limit if isinstance(limit, Judge) else limit
    asked = _asked(measured, config, {}, baseline, 1.0)
    found = guided(asked, config.search, lambda a: not clock.is_past(0.7) and worse_by(a) <= most)
    return Candidate(found, worse_by(found.assignment), 1.0)


def _scale(error_budget: float, start: float | None) -> float:
    return error_budget / start**2 if start else 1.0


def _asked(
    measured: Measured,
    config: Config,
    budgets: Mapping[str, float],
    baseline: Mapping[str, float],
    scale: float,
) -> Problem:
    """The allocation problem of a Config; its tolerance allows `scale` times its square."""
    return problem(
        measured.tables,
        objective=config.objective,
        budgets=budgets,
        baseline=baseline,
        ties=measured.ties,
        live=measured.live,
        scale=scale,
    )


def _solved(
    measured: Measured,
    config: Config,
    budgets: Mapping[str, float],
    baseline: Mapping[str, float],
    scale: float,
) -> Solution:
    """One solve; budgets out of reach are named in the user's units."""
    asked = _asked(measured, config, budgets, baseline, scale)
    try:
        solve = SOLVERS.named(config.solver)
        return solve(asked, time_limit=SOLVE_SECONDS, hint=unchanged(asked))
    except InfeasibleError as error:
        units = partial(in_user_units, measured.tables, baseline, scale or 1.0)
        raise unreachable(asked, units) from error
