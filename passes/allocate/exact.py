"""float = integer / 2^k: the problem in exact integers, one unit per tied group.

Floats are dyadic rationals, so collapsing ties and moving constants loses nothing here.  The only
rounding of the allocator is in `row_of`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from mpq_fx.passes.allocate.problem import (
    Group,
    Problem,
    coupling_of,
    groups_of,
    table_of,
    upper,
    used_quantities,
)

SUM_BITS = 61  # CP-SAT refuses a linear expression whose range leaves int64

Block = Mapping[tuple[int, int], int]  # (option of g, option of h) -> term


@dataclass(frozen=True)
class Quantity:
    """value(a) = (Σ_g single[g][a_g] + Σ_{g<h} blocks[g, h][a_g, a_h]) / 2^shift, exactly."""

    single: tuple[tuple[int, ...], ...]
    blocks: Mapping[tuple[int, int], Block]
    shift: int


@dataclass(frozen=True)
class Form:
    """The quantities that a solver looks at, over groups instead of units."""

    groups: tuple[Group, ...]
    quantities: Mapping[str, Quantity]

    @property
    def is_coupled(self) -> bool:
        return any(quantity.blocks for quantity in self.quantities.values())

    def assignment(self, picks: Iterable[int]) -> dict[str, str]:
        """Option indexes, one per group -> option names, one per unit."""
        chosen = zip(self.groups, picks, strict=True)
        return {unit: group.options[i] for group, i in chosen for unit in group.members}

    def picks(self, assignment: Mapping[str, str]) -> tuple[int | None, ...]:
        """Option names -> option indexes; None where the form does not know the option."""
        names = (assignment.get(group.members[0], "") for group in self.groups)
        known = zip(self.groups, names, strict=True)
        return tuple(g.options.index(n) if n in g.options else None for g, n in known)


@dataclass(frozen=True)
class Row:
    """Σ single·x + Σ blocks·y <= limit stands for quantity <= limit; base + step · row = quantity.

    Coefficients are integers >= 0.  `base` and `step` are exact, in units of 2^-shift.
    """

    single: tuple[tuple[int, ...], ...]
    blocks: Mapping[tuple[int, int], Block]
    limit: int | None
    base: int
    step: int
    shift: int

    @property
    def unit(self) -> float:
        """What one integer stands for."""
        return _ratio(self.step, 1 << self.shift)

    @property
    def scale(self) -> float:
        """Integers per float unit; infinite where a float cannot hold it."""
        return 1.0 / self.unit if self.unit else math.inf

    def bound(self, least: int) -> float:
        """row >= least  ->  quantity >= this, because coefficients were rounded down."""
        return _ratio(self.base + self.step * least, 1 << self.shift)


def form_of(problem: Problem) -> Form:
    """Ties collapsed (sums over members), forced options only, unused quantities left out."""
    groups = groups_of(problem)
    return Form(groups, {n: _quantity(problem, groups, n) for n in used_quantities(problem)})


def _quantity(problem: Problem, groups: tuple[Group, ...], name: str) -> Quantity:
    table, coupling = table_of(problem, name), coupling_of(problem, name)
    terms = (*table.values(), *coupling.values())
    shift = max((x.as_integer_ratio()[1].bit_length() - 1 for x in map(float, terms)), default=0)
    single = [
        [sum(_exact(table[u, o], shift) for u in group.members) for o in group.options]
        for group in groups
    ]
    places = {
        (unit, option): (g, i)
        for g, group in enumerate(groups)
        for i, option in enumerate(group.options)
        for unit in group.members
    }
    blocks: dict[tuple[int, int], dict[tuple[int, int], int]] = {}
    for (u, o, v, p), term in coupling.items():
        if (u, o) in places and (v, p) in places:
            _add(single, blocks, places[u, o], places[v, p], _exact(term, shift))
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


def _exact(value: float, shift: int) -> int:
    numerator, denominator = float(value).as_integer_ratio()
    return (numerator << shift) // denominator


def _ratio(numerator: int, denominator: int) -> float:
    return numerator / denominator  # of integers: correctly rounded, whatever their size


def keep(form: Form, alive: Callable[[int, int], bool]) -> Form:
    """The form with only the options (group, index) that are alive."""
    left = [
        [i for i in range(len(group.options)) if alive(g, i)] for g, group in enumerate(form.groups)
    ]
    groups = tuple(
        replace(group, options=tuple(group.options[i] for i in left[g]))
        for g, group in enumerate(form.groups)
    )
    return Form(groups, {n: _kept(quantity, left) for n, quantity in form.quantities.items()})


def _kept(quantity: Quantity, left: list[list[int]]) -> Quantity:
    single = tuple(
        tuple(terms[i] for i in kept) for terms, kept in zip(quantity.single, left, strict=True)
    )
    blocks = {}
    for (g, h), block in quantity.blocks.items():
        pairs = ((a, b, i, j) for a, i in enumerate(left[g]) for b, j in enumerate(left[h]))
        left_of = {(a, b): block[i, j] for a, b, i, j in pairs if (i, j) in block}
        if left_of:
            blocks[g, h] = left_of
    return replace(quantity, single=single, blocks=blocks)


def drop_dominated(form: Form) -> Form:
    """An option goes if another of its group is no worse in every quantity; ties keep the first.

    Only where no pair or edge touches the group: a coupling can make a worse option right.
    """
    coupled = {g for q in form.quantities.values() for pair in q.blocks for g in pair}
    costs = [
        list(zip(*(q.single[g] for q in form.quantities.values()), strict=True))
        for g in range(len(form.groups))
    ]

    def alive(g: int, i: int) -> bool:
        mine = costs[g][i]
        others = (c for j, c in enumerate(costs[g]) if c != mine or j < i)
        return g in coupled or not any(
            all(a <= b for a, b in zip(other, mine, strict=True)) for other in others
        )

    return keep(form, alive)


def row_of(quantity: Quantity, limit: float | None, *, bits: int, up: bool = False) -> Row:
    """quantity <= limit  ->  integers of at most `bits` bits.  The only place that rounds.

    Per-group minima move into `base`.  What is left of the limit becomes the unit of measure: a
    term above it can never be paid, whatever its size, so 12 decades of spread cost no precision.
    Then everything is divided by `step` and rounded down: every assignment within the limit stays
    within it (`up` rounds up instead: every assignment within the row is within the limit).
    `step` divides all coefficients, thus loses nothing, if they then have at most `bits` bits.
    """
    low = [min(terms) for terms in quantity.single]
    dips = {at: min(0, *block.values()) for at, block in quantity.blocks.items()}
    base = sum(low) + sum(dips.values())
    room = None if limit is None else _floor(limit, quantity.shift) - base
    single = [[t - a for t in s] for s, a in zip(quantity.single, low, strict=True)]
    blocks = {
        at: {ij: block.get(ij, 0) - dips[at] for ij in _cells(quantity, at)}
        for at, block in quantity.blocks.items()
    }
    parts = [*single, *(list(block.values()) for block in blocks.values())]
    room = None if room is None else min(room, _most(parts, room))
    step = _step(parts, room, min(bits, SUM_BITS - len(parts).bit_length()))
    ints = {t: _divide(t, step, room, up=up) for part in parts for t in part}
    return Row(
        tuple(tuple(ints[t] for t in s) for s in single),
        {at: {ij: ints[t] for ij, t in block.items()} for at, block in blocks.items()},
        None if room is None else max(room // step, -1),
        base,
        step,
        quantity.shift,
    )


def _divide(term: int, step: int, room: int | None, *, up: bool) -> int:
    if room is not None and term > room:
        return max(room // step, -1) + 1  # can never be paid
    return -(-term // step) if up else term // step


def _cells(quantity: Quantity, at: tuple[int, int]) -> Iterable[tuple[int, int]]:
    g, h = at
    across, down = len(quantity.single[g]), len(quantity.single[h])
    return ((i, j) for i in range(across) for j in range(down))


def _floor(limit: float, shift: int) -> int:
    """The largest multiple of 2^-shift whose rounded sum can still be within the limit."""
    numerator, denominator = math.nextafter(upper(limit), math.inf).as_integer_ratio()
    return (numerator << shift) // denominator


def _most(parts: list[list[int]], room: int) -> int:
    """No plan that spares the terms above `room` can use more than this."""
    return sum(max((t for t in part if t <= room), default=0) for part in parts)


def _step(parts: list[list[int]], room: int | None, bits: int) -> int:
    terms = {t for part in parts for t in part}
    paid = terms if room is None else {t for t in terms if t <= room}
    common = math.gcd(*paid) or 1
    largest = max(paid, default=0) if room is None or paid == terms else max(room, 0) + common
    if (largest // common).bit_length() <= bits:
        return common
    return -(-largest >> bits) + 1
