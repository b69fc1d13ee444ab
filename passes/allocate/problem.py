"""min Σ_u T[u, a(u)] + Σ_{u,v} P[u, a(u), v, a(v)]   s.t.  other sums of this kind <= budgets.

Plain tables in, an assignment `a` (unit -> option) out.  Nothing here knows tensors or solvers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from mpq_fx.errors import ConfigError

ERROR = "error"
NOISE = "noise"  # beside an error that may be negative: a resource within the same budget
TOLERANCE = 1e-9  # relative: sums of the same floats in another order must not decide feasibility

Single = Mapping[tuple[str, str], float]
Coupling = Mapping[tuple[str, str, str, str], float]
Status = Literal["OPTIMAL", "FEASIBLE"]


@dataclass(frozen=True)
class Problem:
    """min objective[0], then objective[1], …   s.t.  quantity(a) <= budget for every budget.

    quantity(a) = Σ_u table[u, a(u)] + Σ coupling[u, a(u), v, a(v)].  The quantity "error" has the
    table `error` and the couplings `pairs`; a resource has `resources[name]` and `edges[name]`.
    All units of a tie take the same option, one that each of them offers.  Whole assignments that
    are `excluded` are no answer: what is known of them came from elsewhere.  Checked when built.
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

    def __post_init__(self) -> None:
        _check_names(self)
        _check_options(self)
        for name in (ERROR, *self.resources):
            _check_single(self, name)
            _check_coupling(self, name)
        _check_budgets(self)
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


@dataclass(frozen=True)
class Group:
    """Tied units, and the options left to them after ties and forced choices."""

    members: tuple[str, ...]
    options: tuple[str, ...]


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


def value_of(problem: Problem, name: str, assignment: Mapping[str, str]) -> float:
    """Σ_u table[u, a(u)] + Σ coupling[u, a(u), v, a(v)], correctly rounded."""
    table = table_of(problem, name)
    singles = (table[u, assignment[u]] for u in problem.options)
    both = (
        term
        for (u, o, v, p), term in coupling_of(problem, name).items()
        if assignment[u] == o and assignment[v] == p
    )
    return math.fsum((*singles, *both))


def values_of(problem: Problem, assignment: Mapping[str, str]) -> dict[str, float]:
    """Every quantity of the problem -> its value under `assignment`."""
    return {n: value_of(problem, n, assignment) for n in (ERROR, *problem.resources)}


def is_feasible(problem: Problem, assignment: Mapping[str, str]) -> bool:
    """One offered option per unit, ties equal, forced kept, every budget met, not excluded."""
    offered = all(assignment.get(u) in offers for u, offers in problem.options.items())
    tied = all(len({assignment.get(u) for u in tie}) <= 1 for tie in problem.ties)
    kept = all(assignment.get(u) == o for u, o in problem.forced.items())
    fits = offered and tied and kept and meets(problem, problem.budgets, assignment)
    return fits and dict(assignment) not in problem.excluded


def meets(problem: Problem, limits: Mapping[str, float], assignment: Mapping[str, str]) -> bool:
    """value(name) <= limit for every (name, limit)."""
    return all(within(value_of(problem, n, assignment), at) for n, at in limits.items())


def groups_of(problem: Problem) -> tuple[Group, ...]:
    """Ties that share a unit are merged; a group keeps the options that all its members offer."""
    leader = {unit: unit for unit in problem.options}
    for tie in problem.ties:
        roots = {_root(leader, unit) for unit in tie}
        first = next(unit for unit in problem.options if unit in roots) if roots else ""
        leader.update(dict.fromkeys(roots, first))
    members: dict[str, list[str]] = {}
    for unit in problem.options:
        members.setdefault(_root(leader, unit), []).append(unit)
    return tuple(Group(tuple(m), _common(problem, m)) for m in members.values())


def _root(leader: Mapping[str, str], unit: str) -> str:
    while leader[unit] != unit:
        unit = leader[unit]
    return unit


def _common(problem: Problem, members: list[str]) -> tuple[str, ...]:
    shared = set(problem.options[members[0]]).intersection(*(problem.options[m] for m in members))
    wanted = {problem.forced[m] for m in members if m in problem.forced}
    left = shared & wanted if wanted else shared
    if len(wanted) <= 1 and left:
        return tuple(o for o in problem.options[members[0]] if o in left)
    offers = "; ".join(f"{m}: {', '.join(problem.options[m])}" for m in members)
    named = {m: problem.forced[m] for m in members if m in problem.forced}
    raise ConfigError(
        f"tied units have no option in common ({offers})" + (f", forced {named}" if named else ""),
        at=" = ".join(members),
        fix="offer one format to all of them, or force none of them",
    )


def _check_names(problem: Problem) -> None:
    known = (ERROR, *problem.resources)
    if ERROR in problem.resources:
        raise ConfigError('"error" is not a resource', fix="pass it as Problem(error=...)")
    if not problem.objective or len(set(problem.objective)) < len(problem.objective):
        raise ConfigError(
            f"objective {problem.objective!r} is empty or names a quantity twice",
            fix=f"objective={(*known[-1:], ERROR)!r}",
        )
    named = (("objective", problem.objective), ("budgets", problem.budgets))
    for role, names in named:
        _refuse_unknown(role, names, known)
    _refuse_unknown("edges", problem.edges, tuple(problem.resources))
    _refuse_unknown("ties", (u for tie in problem.ties for u in tie), problem.options)
    _refuse_unknown("forced", problem.forced, problem.options)
    _refuse_unknown("excluded", (u for plan in problem.excluded for u in plan), problem.options)


def _refuse_unknown(role: str, names: Iterable[str], known: Iterable[str]) -> None:
    known = set(known)
    for name in names:
        if name not in known:
            raise ConfigError(
                f"{role} names {name!r}, which the problem does not have",
                fix="one of " + (", ".join(sorted(known)[:8]) or "nothing: there is none"),
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


def _check_budgets(problem: Problem) -> None:
    for name, budget in problem.budgets.items():
        if not math.isfinite(budget) or budget < 0:
            raise ConfigError(
                f"the budget of {name!r} is {budget}",
                fix="a number >= 0, or no budget of this name",
            )


def used_quantities(problem: Problem) -> Iterator[str]:
    """Objectives and budgets, each once: what a solver has to look at."""
    yield from dict.fromkeys((*problem.objective, *problem.budgets))
