"""ties, forced choices and links -> groups of units that take one option, and what they agree on"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mpq_fx.errors import ConfigError

if TYPE_CHECKING:
    from mpq_fx.passes.allocate.problem import Problem


@dataclass(frozen=True)
class Group:
    """Tied units, and the options left to them after ties, links and forced choices."""

    members: tuple[str, ...]
    options: tuple[str, ...]


@dataclass(frozen=True)
class Link:
    """classes[k][i] of option i of groups[k]: all groups take options of one class."""

    groups: tuple[int, ...]
    classes: tuple[tuple[str, ...], ...]


def groups_of(problem: Problem) -> tuple[Group, ...]:
    """Ties that share a unit are merged; a group keeps the options that all its members offer, and
    of those the ones whose class every group that it is linked with offers, too.
    """
    tied = merged(problem.options, problem.ties)
    groups = tuple(Group(tuple(m), _common(problem, m)) for m in tied)
    return _agreeing(problem, groups)


def links_of(problem: Problem, groups: Sequence[Group]) -> tuple[Link, ...]:
    """Links that share a unit are merged; those inside one group, or said twice, are left out."""
    found = {}
    for units, at in _linked(problem, groups):
        classes = tuple(
            tuple(_class_of(problem, units, groups[g], o) or "" for o in groups[g].options)
            for g in at
        )
        if len(at) > 1:
            found[Link(tuple(at), classes)] = None
    return tuple(found)


def is_agreed(problem: Problem, assignment: Mapping[str, str]) -> bool:
    """Do the units of every link take options of one class?"""
    return all(
        len({class_of(problem, unit, assignment.get(unit, "")) for unit in link}) <= 1
        for link in problem.links
    )


def class_of(problem: Problem, unit: str, option: str) -> str:
    """What links compare: a class that the problem names, else the option itself."""
    return problem.classes.get((unit, option), option)


def merged(units: Iterable[str], sets: Iterable[Sequence[str]]) -> list[list[str]]:
    """Sets that share a unit become one; every unit stands in one list, in the given order."""
    units = list(units)
    leader, order = {unit: unit for unit in units}, {unit: k for k, unit in enumerate(units)}
    for each in sets:
        roots = {_root(leader, unit) for unit in each}
        leader.update(dict.fromkeys(roots, min(roots, key=order.__getitem__, default="")))
    members: dict[str, list[str]] = {}
    for unit in units:
        members.setdefault(_root(leader, unit), []).append(unit)
    return list(members.values())


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


def _agreeing(problem: Problem, groups: tuple[Group, ...]) -> tuple[Group, ...]:
    """The groups without options whose class a linked group cannot take."""
    left = list(groups)
    for units, at in _linked(problem, groups):
        classes = [{o: _class_of(problem, units, left[g], o) for o in left[g].options} for g in at]
        shared = set.intersection(*(set(found.values()) for found in classes)) - {None}
        if not shared:
            offers = "; ".join(f"{left[g].members[0]}: {', '.join(left[g].options)}" for g in at)
            raise ConfigError(
                f"linked units have no class of options in common ({offers})",
                at=" ~ ".join(units),
                fix="offer options of one class to all of them, or drop the link",
            )
        for g, found in zip(at, classes, strict=True):
            kept = tuple(o for o in left[g].options if found[o] in shared)
            left[g] = replace(left[g], options=kept)
    return groups if tuple(left) == groups else _agreeing(problem, tuple(left))


def _linked(problem: Problem, groups: Sequence[Group]) -> list[tuple[list[str], list[int]]]:
    """The units of each link, and the groups that those stand in."""
    home = {unit: g for g, group in enumerate(groups) for unit in group.members}
    linked = {unit for link in problem.links for unit in link}
    sets = merged((unit for unit in problem.options if unit in linked), problem.links)
    return [(units, sorted({home[unit] for unit in units})) for units in sets]


def _class_of(problem: Problem, units: Sequence[str], group: Group, option: str) -> str | None:
    """The class of a group's option within a link; None if its linked members differ in it."""
    found = {class_of(problem, unit, option) for unit in group.members if unit in units}
    return found.pop() if len(found) == 1 else None
