"""min Σ_u T[u, a(u)] + Σ_{u,v} P[u, a(u), v, a(v)]   s.t.  floors <= other such sums <= budgets.

Plain tables in, an assignment `a` (unit -> option) out.  Nothing here knows tensors or solvers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mpq_fx.errors import ConfigError
from mpq_fx.passes.allocate.groups import groups_of, is_agreed

ERROR = "error"
NOISE = "noise"  # beside an error that may be negative: a resource within the same budget
MINUS = "-"  # "-bits" is the quantity -bits: a floor of bits is a limit of it
TOLERANCE = 1e-9  # relative: sums of the same floats in another order must not decide feasibility

Single = Mapping[tuple[str, str], float]
Coupling = Mapping[tuple[str, str, str, str], float]
Status = Literal["OPTIMAL", "FEASIBLE"]


@dataclass(frozen=True)
class Condition:
    """The unit takes one of the options."""

    unit: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class Term:
    """`value` where every condition holds; always, where there is none."""

    value: float
    when: tuple[Condition, ...] = ()


Peak = tuple[tuple[Term, ...], ...]  # of sums of terms


@dataclass(frozen=True)
class Problem:
    """min objective[0], then objective[1], …   s.t.  floor <= quantity(a) <= budget for each.

    quantity(a) = Σ_u table[u, a(u)] + Σ coupling[u, a(u), v, a(v)].  The quantity "error" has the
    table `error` and the couplings `pairs`; a resource has `resources[name]` and `edges[name]`.
    A peak is the largest of several sums of terms; it may have a budget, but no floor.
    All units of a tie take the same option, one that each of them offers.  All units of a link take
    options of one class: `classes[unit, option]`, or the option itself where none is named.
    `count_of` makes the resource whose floor is "at least so many units take one of these options".
    Whole assignments that are `excluded` are no answer: what is known of them came from elsewhere.
    Checked when built.
    """

    options: Mapping[str, tuple[str, ...]]
    error: Single
    objective: tuple[str, ...]
    pairs: Coupling = field(default_factory=dict)
    resources: Mapping[str, Single] = field(default_factory=dict)
    edges: Mapping[str, Coupling] = field(default_factory=dict)
    budgets: Mapping[str, float] = field(default_factory=dict)
    ties: tuple[tuple[str, ...], ...] = ()
    forced: Mapping[str, str] = field(default_factory=dict)
    excluded: tuple[Mapping[str, str], ...] = ()
    floors: Mapping[str, float] = field(default_factory=dict)
    peaks: Mapping[str, Peak] = field(default_factory=dict)
    links: tuple[tuple[str, ...], ...] = ()
    classes: Mapping[tuple[str, str], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_names(self)
        _check_options(self)
        for name in (ERROR, *self.resources):
            _check_single(self, name)
            _check_coupling(self, name)
        for name, peak in self.peaks.items():
            _check_peak(self, name, peak)
        _check_limits(self)
        groups_of(self)


@dataclass(frozen=True)
class Solution:
    """An assignment that is feasible in floats, and what was proved about it.

    `bounds[name]` is a lower bound of each objective, given the values of the objectives before it.
    `scale[name]` is how many integers stood for one float unit; empty if no rounding took place.
    OPTIMAL: every objective is proved minimal up to `gap`.
    """

    assignment: Mapping[str, str]
    values: Mapping[str, float]
    status: Status
    objective: tuple[str, ...]
    bounds: Mapping[str, float]
    seconds: float
    scale: Mapping[str, float] = field(default_factory=dict)

    @property
    def bound(self) -> float:
        """Lower bound of the first objective."""
        return self.bounds[self.objective[0]]

    @property
    def gap(self) -> float:
        """(value - bound) / |value| of the first objective."""
        return relative_gap(self.values[self.objective[0]], self.bound)


def relative_gap(value: float, bound: float) -> float:
    """(value - bound) / max(|value|, |bound|), 0 where the bound is met."""
    return 0.0 if value <= bound else (value - bound) / max(abs(value), abs(bound))


def upper(limit: float) -> float:
    """limit + 1e-9 · |limit|: the largest value that counts as within `limit`."""
    return limit + TOLERANCE * abs(limit)


def within(value: float, limit: float) -> bool:
    """value <= limit, up to the tolerance."""
    return value <= upper(limit)


def table_of(problem: Problem, name: str) -> Single:
    """The single terms of a quantity."""
    return problem.error if name == ERROR else problem.resources[name]


def coupling_of(problem: Problem, name: str) -> Coupling:
    """The terms of a quantity that need two choices at once."""
    return problem.pairs if name == ERROR else problem.edges.get(name, {})


def count_of(options: Mapping[str, tuple[str, ...]], wanted: Iterable[Condition]) -> Single:
    """1 for each unit that takes one of its options in `wanted`, 0 for others: a resource."""
    counted = {condition.unit: condition.options for condition in wanted}
    return {
        (unit, option): float(option in counted.get(unit, ()))
        for unit, offers in options.items()
        for option in offers
    }


def limits_of(problem: Problem) -> dict[str, float]:
    """Budgets and floors alike, as quantity <= limit: a floor of q is a limit of -q."""
    return {**problem.budgets, **{MINUS + n: -at for n, at in problem.floors.items()}}


def value_of(problem: Problem, name: str, assignment: Mapping[str, str]) -> float:
    """Σ_u table[u, a(u)] + Σ coupling[u, a(u), v, a(v)], correctly rounded; of a peak, the largest
    of its sums.
    """
    if name.startswith(MINUS):
        return -value_of(problem, name.removeprefix(MINUS), assignment)
    if name in problem.peaks:
        return max((_sum(terms, assignment) for terms in problem.peaks[name]), default=0.0)
    table = table_of(problem, name)
    singles = (table[u, assignment[u]] for u in problem.options)
    both = (
        term
        for (u, o, v, p), term in coupling_of(problem, name).items()
        if assignment[u] == o and assignment[v] == p
    )
    return math.fsum((*singles, *both))


def _sum(terms: tuple[Term, ...], assignment: Mapping[str, str]) -> float:
    return math.fsum(t.value for t in terms if all(assignment[c.unit] in c.options for c in t.when))


def values_of(problem: Problem, assignment: Mapping[str, str]) -> dict[str, float]:
    """Every quantity of the problem -> its value under `assignment`."""
    return {n: value_of(problem, n, assignment) for n in quantities_of(problem)}


def quantities_of(problem: Problem) -> tuple[str, ...]:
    """The names of all quantities."""
    return (ERROR, *problem.resources, *problem.peaks)


def is_feasible(problem: Problem, assignment: Mapping[str, str]) -> bool:
    """One offered option per unit, ties equal, links agreed, forced kept, every limit met, not
    excluded.
    """
    offered = all(assignment.get(u) in offers for u, offers in problem.options.items())
    tied = all(len({assignment.get(u) for u in tie}) <= 1 for tie in problem.ties)
    kept = all(assignment.get(u) == o for u, o in problem.forced.items())
    if not (offered and tied and kept and is_agreed(problem, assignment)):
        return False
    fits = meets(problem, limits_of(problem), assignment)
    return fits and dict(assignment) not in problem.excluded


def meets(problem: Problem, limits: Mapping[str, float], assignment: Mapping[str, str]) -> bool:
    """value(name) <= limit for every (name, limit)."""
    return all(within(value_of(problem, n, assignment), at) for n, at in limits.items())


def _check_names(problem: Problem) -> None:
    known = quantities_of(problem)
    if ERROR in (*problem.resources, *problem.peaks):
        raise ConfigError('"error" is not a resource', fix="pass it as Problem(error=...)")
    for name in known:
        if name.startswith(MINUS) or known.count(name) > 1:
            raise ConfigError(
                f"{name!r} cannot be the name of a quantity, or is that of two",
                fix=f"another name than {name!r}",
            )
    if not problem.objective or len(set(problem.objective)) < len(problem.objective):
        raise ConfigError(
            f"objective {problem.objective!r} is empty or names a quantity twice",
            fix=f"objective={(*known[-1:], ERROR)!r}",
        )
    named = (("objective", problem.objective), ("budgets", problem.budgets))
    for role, names in named:
        _refuse_unknown(role, names, known)
    _refuse_unknown("floors", problem.floors, (ERROR, *problem.resources))
    _refuse_unknown("edges", problem.edges, tuple(problem.resources))
    _refuse_unknown("ties", (u for tie in problem.ties for u in tie), problem.options)
    _refuse_unknown("links", (u for link in problem.links for u in link), problem.options)
    _refuse_unknown("forced", problem.forced, problem.options)
    offered = {(u, o) for u, offers in problem.options.items() for o in offers}
    _refuse_unknown("classes", problem.classes, offered)
    _refuse_unknown("excluded", (u for plan in problem.excluded for u in plan), problem.options)


def _refuse_unknown(role: str, names: Iterable[Any], known: Iterable[Any]) -> None:
    known = set(known)
    for name in names:
        if name not in known:
            valid = ", ".join(map(str, sorted(known)[:8]))
            raise ConfigError(
                f"{role} names {name!r}, which the problem does not have",
                fix="one of " + (valid or "nothing: there is none"),
            )


def _check_options(problem: Problem) -> None:
    for unit, offers in problem.options.items():
        if not offers or len(set(offers)) < len(offers):
            raise ConfigError(
                f"unit {unit!r} has no option, or one twice: {tuple(offers)!r}",
                at=unit,
                fix="offer at least its float format",
            )
    for unit, option in problem.forced.items():
        if option not in problem.options[unit]:
            raise ConfigError(
                f"{option!r} is forced but not offered",
                at=unit,
                fix="one of " + ", ".join(problem.options[unit]),
            )


def _check_single(problem: Problem, name: str) -> None:
    table = table_of(problem, name)
    wanted = {(u, o) for u, offers in problem.options.items() for o in offers}
    if table.keys() != wanted:
        unknown = sorted(table.keys() - wanted)[:3]
        missing = sorted(wanted - table.keys())[:3]
        raise ConfigError(
            f"table {name!r} does not fit the options: missing {missing}, unknown {unknown}",
            fix="give one value for every (unit, option)",
        )
    _refuse_infinite(name, table.items())


def _check_coupling(problem: Problem, name: str) -> None:
    terms = coupling_of(problem, name)
    for u, o, v, p in terms:
        known = o in problem.options.get(u, ()) and p in problem.options.get(v, ())
        if u == v or not known:
            raise ConfigError(
                f"a pair term of {name!r} joins {u!r}={o!r} and {v!r}={p!r}",
                fix="join two different units and options that they offer",
            )
    _refuse_infinite(name, terms.items())


def _refuse_infinite(name: str, items: Iterable[tuple[tuple[str, ...], float]]) -> None:
    for key, term in items:
        if not math.isfinite(term):
            raise ConfigError(
                f"{name!r} has the value {term}",
                at=str(key),
                fix="drop the option, or measure again",
            )


def _check_peak(problem: Problem, name: str, peak: Peak) -> None:
    for condition in (c for terms in peak for term in terms for c in term.when):
        offers = problem.options.get(condition.unit, ())
        if not set(condition.options) <= set(offers):
            raise ConfigError(
                f"a term of {name!r} asks for {condition.unit!r} in {condition.options!r}",
                fix="units of the problem, and options that they offer",
            )
    _refuse_infinite(name, ((("sum", str(k)), t.value) for k, ts in enumerate(peak) for t in ts))


def _check_limits(problem: Problem) -> None:
    for name, budget in problem.budgets.items():
        if not math.isfinite(budget) or budget < 0:
            raise ConfigError(
                f"the budget of {name!r} is {budget}",
                fix="a number >= 0, or no budget of this name",
            )
    for name, floor in problem.floors.items():
        if not math.isfinite(floor):
            raise ConfigError(
                f"the floor of {name!r} is {floor}", fix="a number, or no floor of this name"
            )


def used_quantities(problem: Problem) -> Iterator[str]:
    """Objectives and what is limited, each once: what a solver has to look at."""
    yield from dict.fromkeys((*problem.objective, *limits_of(problem)))
