"""float = integer / 2^k: the problem in exact integers, one unit per tied group.

Floats are dyadic rationals, so collapsing ties and moving constants loses nothing here.  The only
rounding of the allocator is in `rows`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from mpq_fx.passes.allocate.groups import Group, Link, groups_of, links_of
from mpq_fx.passes.allocate.peaks import Places, contenders, parts_of_peak
from mpq_fx.passes.allocate.problem import (
    MINUS,
    Problem,
    coupling_of,
    table_of,
    used_quantities,
)
from mpq_fx.passes.allocate.quantity import Quantity, exact, kept, negative, shift_of

Quantities = Mapping[str, tuple[Quantity, ...]]  # the largest of the parts counts


@dataclass(frozen=True)
class Form:
    """The quantities that a solver looks at, over groups instead of units."""

    groups: tuple[Group, ...]
    quantities: Quantities
    links: tuple[Link, ...] = ()

    @property
    def parts(self) -> tuple[Quantity, ...]:
        return tuple(part for parts in self.quantities.values() for part in parts)

    @property
    def is_coupled(self) -> bool:
        return any(part.blocks for part in self.parts)

    def assignment(self, picks: Iterable[int]) -> dict[str, str]:
        """Option indexes, one per group -> option names, one per unit."""
        chosen = zip(self.groups, picks, strict=True)
        return {unit: group.options[i] for group, i in chosen for unit in group.members}

    def picks(self, assignment: Mapping[str, str]) -> tuple[int | None, ...]:
        """Option names -> option indexes; None where the form does not know the option."""
        names = (assignment.get(group.members[0], "") for group in self.groups)
        known = zip(self.groups, names, strict=True)
        return tuple(g.options.index(n) if n in g.options else None for g, n in known)


def form_of(problem: Problem) -> Form:
    """Ties collapsed (sums over members), forced options only, unused quantities left out."""
    groups = groups_of(problem)
    places = {
        (unit, option): (g, i)
        for g, group in enumerate(groups)
        for i, option in enumerate(group.options)
        for unit in group.members
    }
    quantities = {n: _parts(problem, groups, places, n) for n in used_quantities(problem)}
    return Form(groups, quantities, links_of(problem, groups))


def _parts(
    problem: Problem, groups: tuple[Group, ...], places: Places, name: str
) -> tuple[Quantity, ...]:
    """What the quantity is the largest of."""
    if name in problem.peaks:
        return contenders(
            parts_of_peak(problem.peaks[name], [len(g.options) for g in groups], places)
        )
    if name.startswith(MINUS):
        return (negative(_quantity(problem, groups, places, name.removeprefix(MINUS))),)
    return (_quantity(problem, groups, places, name),)


def _quantity(problem: Problem, groups: tuple[Group, ...], places: Places, name: str) -> Quantity:
    table, coupling = table_of(problem, name), coupling_of(problem, name)
    shift = shift_of((*table.values(), *coupling.values()))
    single = [
        [sum(exact(table[u, o], shift) for u in group.members) for o in group.options]
        for group in groups
    ]
    blocks: dict[tuple[int, int], dict[tuple[int, int], int]] = {}
    for (u, o, v, p), term in coupling.items():
        if (u, o) in places and (v, p) in places:
            _add(single, blocks, places[u, o], places[v, p], exact(term, shift))
    return Quantity(tuple(map(tuple, single)), blocks, shift)


def _add(
    single: list[list[int]],
    blocks: dict[tuple[int, int], dict[tuple[int, int], int]],
    first: tuple[int, int],
    second: tuple[int, int],
    term: int,
) -> None:
    (g, i), (h, j) = sorted((first, second))
    if g != h:
        block = blocks.setdefault((g, h), {})
        block[i, j] = block.get((i, j), 0) + term
    elif i == j:  # tied units: both terms always, or never
        single[g][i] += term


def keep(form: Form, alive: Callable[[int, int], bool]) -> Form:
    """The form with only the options (group, index) that are alive."""
    left = [
        [i for i in range(len(group.options)) if alive(g, i)] for g, group in enumerate(form.groups)
    ]
    groups = tuple(
        replace(group, options=tuple(group.options[i] for i in left[g]))
        for g, group in enumerate(form.groups)
    )
    quantities = {
        name: tuple(kept(part, left) for part in parts) for name, parts in form.quantities.items()
    }
    return Form(groups, quantities, tuple(_left_of(link, left) for link in form.links))


def _left_of(link: Link, left: Sequence[Sequence[int]]) -> Link:
    classes = zip(link.groups, link.classes, strict=True)
    return replace(link, classes=tuple(tuple(names[i] for i in left[g]) for g, names in classes))


def drop_dominated(form: Form) -> Form:
    """An option goes if another of its group, and of its classes where it is linked, is no worse in
    every quantity; ties keep the first.

    Only where no pair or edge touches the group: a coupling can make a worse option right.
    """
    coupled = {g for part in form.parts for pair in part.blocks for g in pair}
    coupled |= {g for part in form.parts for meeting in part.joint for g, _ in meeting}
    costs = [
        list(zip(*(part.single[g] for part in form.parts), strict=True))
        for g in range(len(form.groups))
    ]
    classes: list[list[tuple[str, ...]]] = [[()] * len(group.options) for group in form.groups]
    for link in form.links:
        for g, names in zip(link.groups, link.classes, strict=True):
            classes[g] = [(*old, new) for old, new in zip(classes[g], names, strict=True)]

    def alive(g: int, i: int) -> bool:
        mine = costs[g][i]
        others = (
            cost
            for j, cost in enumerate(costs[g])
            if classes[g][j] == classes[g][i] and (cost != mine or j < i)
        )
        return g in coupled or not any(
            all(a <= b for a, b in zip(other, mine, strict=True)) for other in others
        )

    return keep(form, alive)
