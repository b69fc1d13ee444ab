"""budgets -> a smallest set of them that no plan meets together, and what is within reach."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mpq_fx.errors import InfeasibleError
from mpq_fx.passes.allocate.exact import Form, form_of
from mpq_fx.passes.allocate.minimize import Level, Search, minimize
from mpq_fx.passes.allocate.model import Clock
from mpq_fx.passes.allocate.problem import ERROR, NOISE, TOLERANCE, Problem, within

# The option that a user types for a budget; an error budget is a noise power, its option the root.
OPTION = {
    ERROR: "tolerance",
    NOISE: "tolerance",
    "latency": "max_latency",
    "size": "max_size",
    "bits": "max_bits",
    "bops": "max_bops",
}
DIGITS = 6


@dataclass(frozen=True)
class Diagnosis:
    """Why no plan meets the budgets.

    conflict: budgets that cannot be met together, while any one fewer of them can.
    alone: the smallest value of each budgeted quantity without the other budgets.
    kept: the same with all other budgets kept; inf if those conflict already.
    reachable: budgets, each at least the user's, that one plan meets.
    """

    conflict: tuple[str, ...]
    alone: Mapping[str, float]
    kept: Mapping[str, float]
    reachable: Mapping[str, float]


def explain(problem: Problem, *, time_limit: float = 10.0) -> InfeasibleError:
    """The error to raise for a problem whose budgets no plan meets, or none but excluded ones."""
    if problem.excluded:
        known = len(problem.excluded)
        return InfeasibleError(f"no plan meets the budgets but {known} that are excluded")
    found = diagnose(problem, time_limit=time_limit)
    named = " and ".join(f"{n} <= {problem.budgets[n]:g}" for n in found.conflict)
    together = " together" if len(found.conflict) > 1 else ""
    lines = [f"no plan meets {named}{together}"]
    for name, budget in problem.budgets.items():
        kept = found.kept[name]
        others = f", {_up(kept):g} with the other budgets kept" if kept < math.inf else ""
        others = others if len(problem.budgets) > 1 else ""
        alone = _up(found.alone[name])
        lines.append(f"    {name}: budget {budget:g}, smallest reachable {alone:g}{others}")
    return InfeasibleError("\n".join(lines), fix=_fix(problem, found))


def diagnose(problem: Problem, *, time_limit: float = 10.0) -> Diagnosis:
    """Deletion filter for the conflict, then one minimization per budget and question."""
    form = form_of(problem)
    solves = len(problem.budgets) * 4
    share = time_limit / solves

    def least(name: str, names: Iterable[str], budgets: Mapping[str, float]) -> Level:
        limits = {n: budgets[n] for n in names if n != name}
        return minimize(Search(problem, form, name, limits, Clock(share)))

    budgets, conflict = problem.budgets, list(problem.budgets)
    for name in problem.budgets:
        rest = [n for n in conflict if n != name]
        if rest and _is_impossible(least(rest[0], rest, budgets), budgets[rest[0]]):
            conflict = rest
    return Diagnosis(
        tuple(conflict),
        {n: least(n, (), budgets).value for n in budgets},
        {n: least(n, budgets, budgets).value for n in budgets},
        _reachable(problem, form, share),
    )


def _is_impossible(level: Level, budget: float) -> bool:
    """Proved: the smallest value exceeds the budget, or the other limits admit nothing."""
    return (level.ended and level.assignment is None) or not within(level.bound, budget)


def _reachable(problem: Problem, form: Form, share: float) -> dict[str, float]:
    """Budgets in order: each keeps its value if it can, given those before it, else its least."""
    settled: dict[str, float] = {}
    for name, budget in problem.budgets.items():
        level = minimize(Search(problem, form, name, settled, Clock(share)))
        settled[name] = budget if within(level.value, budget) else _up(level.value)
    return settled


def _fix(problem: Problem, found: Diagnosis) -> str:
    """One larger budget is enough where the others can be kept; else all that must grow."""
    single = [n for n in found.conflict if found.kept[n] < math.inf]
    if single:
        return "  or  ".join(_option({n: found.kept[n]}) for n in single)
    grown = {n: at for n, at in found.reachable.items() if at > problem.budgets[n]}
    return _option(grown)


def _option(budgets: Mapping[str, float]) -> str:
    typed = (
        f'"{OPTION.get(n, n)}": {_up(math.sqrt(max(at, 0.0)) if n in (ERROR, NOISE) else at):g}'
        for n, at in budgets.items()
    )
    return "options={" + ", ".join(typed) + "}"


def _up(value: float) -> float:
    """The nearest number of six digits, or the next: what is printed must be reachable if typed."""
    if value == 0.0 or not math.isfinite(value):
        return value
    rounded = float(f"{value:.{DIGITS}g}")
    if value - rounded <= TOLERANCE / 10 * abs(value):  # a tenth: its square must be in reach too
        return rounded
    unit = 10.0 ** (math.floor(math.log10(abs(value))) + 1 - DIGITS)
    return float(f"{rounded + unit:.{DIGITS}g}")
