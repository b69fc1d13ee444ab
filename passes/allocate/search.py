"""search(problem, evaluator) -> Candidate: how whole plans are looked for, and what may be asked

A solver minimizes tables.  A search asks for the error of whole plans beside them, and ends with a
plan that was allowed.  SEARCHES in `mpq_fx.passes.allocate` lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from mpq_fx.errors import ConfigError
from mpq_fx.passes.allocate import lagrangian
from mpq_fx.passes.allocate.problem import ERROR, Problem, Solution, is_feasible, values_of, within

if TYPE_CHECKING:
    from mpq_fx.config import Config

Plan = Mapping[str, str]  # unit -> option
Shares = Mapping[tuple[str, str], float]  # (unit, option) -> how much of it a mixture has
BOUND_SECONDS = 2.0  # for the bound of a plan that a search found


class Solver(Protocol):
    """Problem -> Solution, or InfeasibleError."""

    def __call__(
        self, problem: Problem, *, time_limit: float = 10.0, hint: Mapping[str, str] | None = None
    ) -> Solution: ...


class IsPast(Protocol):
    """Is this share of the time for searching over?"""

    def __call__(self, share: float = 1.0) -> bool: ...


@dataclass(frozen=True)
class Evaluator:
    """What a search may ask about plans, besides the tables.

    error(plan): as measured, of the worst recorded call, or of all where there is no limit; or what
    the user's metric loses.  A plan is asked once, its answer remembered.
    gradient(shares, k): (noise power of the mixture on recorded call k, its derivative by every
    share that is named); a unit's result is Σ_o shares[u, o] · (its result in option o).
    """

    error: Callable[[Plan], float]
    limit: float  # the largest error that is allowed; inf where all are
    yardstick: float  # the predicted error that stands for `limit`; 0 for none
    exponent: int  # of an error: what adds up over units is its square, of a drop the drop itself
    gradient: Callable[[Shares, int], tuple[float, Shares]]
    solve: Solver  # the one that the user named
    is_past: IsPast
    others: Sequence[Problem] = ()  # the problem again, with the error tables of other metrics

    def allows(self, plan: Plan) -> bool:
        """Its error is within the limit, and there was time to ask."""
        return not self.is_past() and self.error(plan) <= self.limit


@dataclass(frozen=True)
class Candidate:
    """A plan with its measured error, and the scale of the error budget that a solver was given."""

    solution: Solution
    error: float
    scale: float = 1.0


def nothing(config: Config) -> Iterator[str]:
    """Whatever the user wishes can be searched for."""
    yield from ()


def unmeant(config: Config, budgets: tuple[str, ...]) -> Iterator[str]:
    """Why not, where the user set one of these budgets."""
    if given := ", ".join(name for name in budgets if name in config.budgets):
        yield f"cannot keep to {given}"


def check_unlinked(problem: Problem) -> None:
    """ConfigError for a problem with links, if units change one at a time."""
    if problem.links:
        raise ConfigError(
            "this search lowers one unit at a time, and links change several at once",
            fix='search="solver"',
        )


def check_budgets_alone(problem: Problem) -> None:
    """ConfigError for limits that a search by budgets of sums would break without a word."""
    check_unlinked(problem)
    limited = sorted({*problem.floors, *(problem.peaks.keys() & problem.budgets.keys())})
    if limited:
        raise ConfigError(
            f"this search keeps to budgets of sums, and {', '.join(limited)} has a floor or a peak",
            fix='search="solver"',
        )


@dataclass(frozen=True)
class Search:
    """`run` gets the problem with every budget but that of the error, which is the evaluator's.

    Its plan is feasible and within `evaluator.limit`; None where no plan that it asked for is.
    """

    run: Callable[[Problem, Evaluator], Candidate | None]
    refuse: Callable[[Config], Iterator[str]] = nothing  # why not for these options


def remembered(error: Callable[[Plan], float]) -> Callable[[Plan], float]:
    """The same function, which measures no plan twice."""
    known: dict[frozenset[tuple[str, str]], float] = {}

    def ask(plan: Plan) -> float:
        key = frozenset(plan.items())
        if key not in known:
            known[key] = error(plan)
        return known[key]

    return ask


def candidate_of(
    problem: Problem, evaluator: Evaluator, plan: Plan, seconds: float
) -> Candidate | None:
    """A plan that no solver proved anything about; None where it is not allowed.

    The bound is that of the tables within the budgets, whatever the measured error.
    """
    error = evaluator.error(plan)
    if error > evaluator.limit or not is_feasible(problem, plan):
        return None
    pairs = problem.pairs if problem.objective[0] == ERROR else {}
    least = lagrangian.solve(replace(problem, pairs=pairs), time_limit=BOUND_SECONDS, hint=plan)
    return Candidate(
        Solution(
            assignment=dict(plan),
            values=values_of(problem, plan),
            status="FEASIBLE",
            objective=problem.objective,
            bounds=least.bounds,
            seconds=seconds,
        ),
        error,
    )


def is_allowed(problem: Problem, evaluator: Evaluator, candidate: Candidate) -> bool:
    """What `Search.run` promises of its plan, looked up rather than believed."""
    plan = candidate.solution.assignment
    return is_feasible(problem, plan) and within(evaluator.error(plan), evaluator.limit)
