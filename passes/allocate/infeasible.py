"""limits -> a smallest set of them that no plan meets together, and what is within reach."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mpq_fx.errors import InfeasibleError
from mpq_fx.passes.allocate.exact import Form, form_of
from mpq_fx.passes.allocate.minimize import Level, Search, minimize
from mpq_fx.passes.allocate.model import Clock
from mpq_fx.passes.allocate.problem import (
    ERROR,
    MINUS,
    NOISE,
    TOLERANCE,
    Problem,
    limits_of,
    meets,
    within,
)

SQUARES = (ERROR, NOISE)
# The option that a user types for a limit; an error budget is a noise power, its option the root.
OPTION = {
    ERROR: "tolerance",
    NOISE: "tolerance",
    "latency": "max_latency",
    "size": "max_size",
    "bits": "max_bits",
    MINUS + "bits": "min_bits",
    "bops": "max_bops",
    "activation_memory": "max_activation_memory",
}
DIGITS = 6


@dataclass(frozen=True)
class Diagnosis:
    """Why no plan meets the limits; the floor of a quantity q is a limit of the quantity -q.

    conflict: limits that cannot be met together, while any one fewer of them can; none where ties
        and links alone leave no plan.
    alone: the smallest value of each limited quantity without the other limits.
    kept: the same with all other limits kept; inf if those conflict already.
    reachable: limits, each at least the user's, that one plan meets.
    """

    conflict: tuple[str, ...]
    alone: Mapping[str, float]
    kept: Mapping[str, float]
    reachable: Mapping[str, float]


def explain(problem: Problem, *, time_limit: float = 10.0) -> InfeasibleError:
    """The error to raise for a problem whose limits no plan meets, or none but excluded ones."""
    if problem.excluded:
        known = len(problem.excluded)
        return InfeasibleError(f"no plan meets the budgets but {known} that are excluded")
    found, limits = diagnose(problem, time_limit=time_limit), limits_of(problem)
    if not found.conflict:
        return no_agreement(problem)
    named = " and ".join(_said(n, limits[n]) for n in found.conflict)
    together = " together" if len(found.conflict) > 1 else ""
    lines = [f"no plan meets {named}{together}"]
    lines += [
        _line(name, limit, found, is_alone=len(limits) == 1) for name, limit in limits.items()
    ]
    return InfeasibleError("\n".join(lines), fix=_fix(limits, found))


def _line(name: str, limit: float, found: Diagnosis, *, is_alone: bool) -> str:
    """ "bits: budget 4, smallest reachable 2, 5 with the other budgets kept" """
    kind, end = ("floor", "largest") if name.startswith(MINUS) else ("budget", "smallest")
    asked = f"{name.removeprefix(MINUS)}: {kind} {unsigned(name, limit):g}"
    line = f"    {asked}, {end} reachable {_number(name, found.alone[name])}"
    if is_alone or found.kept[name] == math.inf:
        return line
    return f"{line}, {_number(name, found.kept[name])} with the other budgets kept"


def no_agreement(problem: Problem) -> InfeasibleError:
    """The error to raise where ties and links contradict each other, whatever is limited."""
    links = "; ".join(" ~ ".join(link) for link in problem.links)
    return InfeasibleError(
        f"no plan gives the units of each link options of one class ({links})",
        fix="fewer ties or links, or more options",
    )


def diagnose(problem: Problem, *, time_limit: float = 10.0) -> Diagnosis:
    """Deletion filter for the conflict, then one minimization per limit and question."""
    form, limits = form_of(problem), limits_of(problem)
    share = time_limit / max(4 * len(limits), 1)
    unchanged = {unit: options[0] for unit, options in problem.options.items()}

    def least(name: str, names: Iterable[str]) -> Level:
        others = {n: limits[n] for n in names if n != name}
        return minimize(Search(problem, form, name, others, Clock(share)), unchanged)

    if limits and _has_no_plan(least(next(iter(limits)), ())):
        return Diagnosis((), {}, {}, {})
    conflict = list(limits)
    for name in limits:
        rest = [n for n in conflict if n != name]
        if rest and _is_impossible(least(rest[0], rest), limits[rest[0]]):
            conflict = rest
    return Diagnosis(
        tuple(conflict),
        {n: least(n, ()).value for n in limits},
        {n: least(n, limits).value for n in limits},
        _reachable(problem, form, share, unchanged),
    )


def _has_no_plan(level: Level) -> bool:
    return level.ended and level.assignment is None


def _is_impossible(level: Level, budget: float) -> bool:
    """Proved: the smallest value exceeds the budget, or the other limits admit nothing."""
    return _has_no_plan(level) or not within(level.bound, budget)


def _reachable(
    problem: Problem, form: Form, share: float, unchanged: Mapping[str, str]
) -> dict[str, float]:
    """Limits in order: each keeps its value if it can, given those before it, else its least.

    Each search begins with a plan that meets what is settled: CP-SAT may find none in its time.  A
    limit of which no plan is known is left out.
    """
    settled: dict[str, float] = {}
    last = unchanged
    for name, budget in limits_of(problem).items():
        hint = unchanged if meets(problem, settled, unchanged) else last
        level = minimize(Search(problem, form, name, settled, Clock(share)), hint)
        if level.assignment is None:
            continue
        settled[name] = budget if within(level.value, budget) else _up(level.value)
        last = level.assignment
    return settled


def _fix(limits: Mapping[str, float], found: Diagnosis) -> str:
    """One wider limit is enough where the others can be kept; else all that must give way."""
    single = [n for n in found.conflict if found.kept[n] < math.inf]
    if single:
        return "  or  ".join(_option({n: found.kept[n]}) for n in single)
    grown = {n: at for n, at in found.reachable.items() if at > limits[n]}
    return _option(grown) if grown else "wider budgets"


def _option(limits: Mapping[str, float]) -> str:
    typed = (
        f'"{OPTION.get(n, n)}": {_number(n, math.sqrt(max(at, 0.0)) if n in SQUARES else at)}'
        for n, at in limits.items()
    )
    return "options={" + ", ".join(typed) + "}"


def _said(name: str, limit: float) -> str:
    """ "size <= 8", "bits >= 4" """
    relation = ">=" if name.startswith(MINUS) else "<="
    return f"{name.removeprefix(MINUS)} {relation} {unsigned(name, limit):g}"


def _number(name: str, limit: float) -> str:
    """A limit as a user reads it, that can be reached if typed."""
    return f"{unsigned(name, _up(limit)):g}"


def unsigned(name: str, limit: float) -> float:
    """A limit as a user writes it: a floor of q is a limit of -q."""
    return 0.0 - limit if name.startswith(MINUS) else limit


def _up(value: float) -> float:
    """The nearest number of six digits, or the next: what is printed must be reachable if typed."""
    if value == 0.0 or not math.isfinite(value):
        return value
    rounded = float(f"{value:.{DIGITS}g}")
    if value - rounded <= TOLERANCE / 10 * abs(value):  # a tenth: its square must be in reach too
        return rounded
    unit = 10.0 ** (math.floor(math.log10(abs(value))) + 1 - DIGITS)
    return float(f"{rounded + unit:.{DIGITS}g}")
