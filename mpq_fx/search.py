"""tables -> the assignment that is fastest (or smallest) among those whose *measured* error is
allowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any, NoReturn

from mpq_fx.activation_memory import peak
from mpq_fx.clock import Clock
from mpq_fx.config import Config
from mpq_fx.errors import InfeasibleError, PluginError
from mpq_fx.facts import Choice
from mpq_fx.measure import Measured, Record, parse
from mpq_fx.passes.allocate import SEARCHES, SOLVERS, Candidate, Evaluator, Problem, Solution
from mpq_fx.passes.allocate.problem import ERROR, NOISE
from mpq_fx.passes.allocate.search import Shares, is_allowed, remembered
from mpq_fx.passes.analyze.mixture import Mixture, mixed
from mpq_fx.passes.analyze.replay import Replayer, output_error, worst_error
from mpq_fx.problem import (
    MEMORY,
    in_user_units,
    numbers,
    problem,
    total,
    unchanged,
    unreachable,
    words,
)


@dataclass(frozen=True)
class Judge:
    """The user's own measure of a plan under test: how much worse it makes the model, and the
    limit.
    """

    drop: Callable[[Replayer, Mapping[str, Choice]], float]  # sites named as in the graph
    limit: float


SOLVE_SECONDS = 5.0
SEARCH_SHARE = 0.7  # of the time budget, after which a search asks no more
CUT = "the search was ended before it had asked for all that it would"


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


def mean_error(measured: Measured) -> Callable[[Mapping[str, str]], float]:
    """assignment -> √ of its mean noise power over all calls but those of the report.

    Where nothing limits the error it only ranks plans, and more calls rank them better.
    """
    chosen = measured.parts.choose
    further = [r for r in measured.parts.fit if all(r is not known for known in chosen)]
    references = [*measured.references, *(measured.replay.run(r, {}) for r in further)]
    both = [*zip((*chosen, *further), references, strict=True)]

    def error(assignment: Mapping[str, str]) -> float:
        choices = parse(measured.proposal, assignment)
        runs = ((measured.replay.run(record, choices), y) for record, y in both)
        return fmean(output_error(outputs, y, measured.excluded) ** 2 for outputs, y in runs) ** 0.5

    return error


def drop(measured: Measured, judge: Judge, assignment: Mapping[str, str]) -> float:
    """How much of the user's metric an assignment loses."""
    return judge.drop(measured.replay, parse(measured.proposal, assignment))


def float_baseline(measured: Measured) -> dict[str, float]:
    """What the float model uses in all: the sum over sites and, of bytes, every other parameter."""
    first = {unit: kept[0].name for unit, kept in measured.proposal.options.items()}
    sums = {
        name: total(table, first)
        for name, table in measured.tables.items()
        if name not in (ERROR, NOISE)
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
    """The plan of the search that the user named; it keeps to every limit."""
    limits = {name: value for name, value in budgets.items() if name != "tolerance"}
    asked = problem(
        measured.tables,
        objective=config.objective,
        budgets=limits,
        baseline=baseline,
        ties=measured.ties,
        live=measured.live,
    )
    others = [
        replace(asked, error=dict(table.values), pairs=dict(table.pairs))
        for table in measured.tables[ERROR].others
    ]
    evaluator = replace(_evaluator(measured, config, clock, judge), others=others)
    name = config.search if measured.sites else "solver"  # without a choice there is nothing to try
    best = SEARCHES.named(name).run(asked, evaluator)
    if best is None:
        _raise_unmet(evaluator, limits, judge)
    if not is_allowed(asked, evaluator, best):
        raise PluginError(
            f"the search {name!r} ended with a plan that is not allowed: its error is "
            f"{evaluator.error(best.solution.assignment):.3g}, limit {evaluator.limit:.3g}, or it "
            "breaks a budget",
            fix='search="solver"',
        )
    return best


def _raise_unmet(
    evaluator: Evaluator, budgets: Mapping[str, float], judge: Judge | None
) -> NoReturn:
    limits = [words(name, value) for name, value in budgets.items()]
    if evaluator.limit < math.inf:
        most = "an error of at most" if judge is None else "a drop of"
        limits.insert(0, f"{most} {evaluator.limit:.3g}")
    raise InfeasibleError(
        f"no plan that was tried has {' and '.join(limits)}",
        fix="raise the tolerance (or max_drop), or a budget",
    )


def _evaluator(
    measured: Measured,
    config: Config,
    clock: Clock,
    judge: Judge | None,
) -> Evaluator:
    """Measured errors, or drops of the user's metric; the way back through mixtures; the solver."""

    if judge is not None:
        error: Callable[[Mapping[str, str]], float] = partial(drop, measured, judge)
    else:
        is_limited = measured.tolerance is not None
        error = partial(joint_error, measured) if is_limited else mean_error(measured)

    def gradient(shares: Shares, call: int) -> tuple[float, Shares]:
        parts = measured.parts.choose
        mixture = Mixture(measured.replay, measured.proposal.options, shares)
        at = call % len(parts)
        return mixed(mixture, parts[at], measured.references[at], measured.excluded)

    cut: list[str] = []

    def is_past(share: float = 1.0) -> bool:
        is_late = clock.is_past(SEARCH_SHARE * share)
        if is_late and share == 1.0 and not cut:
            cut.append(CUT)
            clock.cut(CUT)
        return is_late

    limit = measured.tolerance if judge is None else judge.limit
    start = measured.tolerance if judge is None else measured.yardstick
    return Evaluator(
        error=remembered(error),
        limit=math.inf if limit is None else limit,
        yardstick=start or 0.0,
        exponent=2 if judge is None else 1,
        gradient=gradient,
        solve=partial(_solved, measured, config, start or 0.0),
        is_past=is_past,
    )


def _solved(
    measured: Measured,
    config: Config,
    start: float,
    problem: Problem,
    *,
    time_limit: float = SOLVE_SECONDS,
    hint: Mapping[str, str] | None = None,
) -> Solution:
    """One solve by the user's solver; budgets out of reach are named in the user's units."""
    try:
        solve = SOLVERS.named(config.solver)
        return solve(problem, time_limit=time_limit, hint=hint or unchanged(problem))
    except InfeasibleError as error:
        if problem.excluded:  # what is left of the plans is none: no fault of the budgets
            raise
        scale = problem.budgets.get(ERROR, 0.0) / start**2 if start else 1.0
        baseline = float_baseline(measured)
        units = partial(in_user_units, measured.tables, baseline, scale or 1.0)
        raise unreachable(problem, units) from error
