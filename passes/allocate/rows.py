"""quantity <= limit  ->  integers for a solver: the only rounding of the allocator"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from mpq_fx.passes.allocate.problem import upper
from mpq_fx.passes.allocate.quantity import Block, Meeting, Quantity

SUM_BITS = 61  # CP-SAT refuses a linear expression whose range leaves int64


@dataclass(frozen=True)
class Row:
    """offset + Σ single·x + Σ blocks·y + Σ joint <= limit stands for quantity <= limit;
    base + step · row = quantity.

    Coefficients are integers >= 0; `joint` has one for a meeting that fails and one where it holds.
    `base` and `step` are exact, in units of 2^-shift.
    """

    single: tuple[tuple[int, ...], ...]
    blocks: Mapping[tuple[int, int], Block]
    limit: int | None
    base: int
    step: int
    shift: int
    offset: int = 0
    joint: Mapping[Meeting, tuple[int, int]] = field(default_factory=dict)

    @property
    def unit(self) -> float:
        """What one integer stands for."""
        return _ratio(self.step, 1 << self.shift)

    @property
    def full(self) -> float:
        """A power of two above the limit: integers divided by it stay exact, sums within it too."""
        return float(1 << (self.limit or 0).bit_length())

    @property
    def scale(self) -> float:
        """Integers per float unit; infinite where a float cannot hold it."""
        return 1.0 / self.unit if self.unit else math.inf

    @property
    def most(self) -> int:
        """No plan has more."""
        blocks = sum(max(block.values()) for block in self.blocks.values())
        return (
            self.offset + sum(map(max, self.single)) + blocks + sum(map(max, self.joint.values()))
        )

    def bound(self, least: int) -> float:
        """row >= least  ->  quantity >= this, because coefficients were rounded down."""
        return _ratio(self.base + self.step * least, 1 << self.shift)


def row_of(quantity: Quantity, limit: float | None, *, bits: int, up: bool = False) -> Row:
    """quantity <= limit  ->  integers of at most `bits` bits.  The only place that rounds.

    Per-group minima move into `base`.  What is left of the limit becomes the unit of measure: a
    term above it can never be paid, whatever its size, so 12 decades of spread cost no precision.
    Then everything is divided by `step` and rounded down: every assignment within the limit stays
    within it (`up` rounds up instead: every assignment within the row is within the limit).
    `step` divides all coefficients, thus loses nothing, if they then have at most `bits` bits.
    """
    return _rounded(_raised(quantity, limit, quantity.least), bits, up=up)


def can_exceed(quantity: Quantity, limit: float) -> bool:
    """Is there an assignment above the limit, as far as single terms tell?"""
    return quantity.most > _floor(limit, quantity.shift)


def rows_of(parts: Sequence[Quantity], limit: float | None, *, bits: int) -> tuple[Row, ...]:
    """Rows of one base and one step, so that the largest of them stands for the largest part."""
    raised = [_raised(part, limit, min(p.least for p in parts)) for part in parts]
    step = max(_rounded(each, bits).step for each in raised)
    return tuple(_rounded(each, bits, step=step) for each in raised)


@dataclass(frozen=True)
class _Raised:
    """A quantity less `base`: terms >= 0 that are exclusive within each part of `parts`."""

    single: list[list[int]]
    blocks: Mapping[tuple[int, int], Mapping[tuple[int, int], int]]
    joint: Mapping[Meeting, tuple[int, int]]  # where it fails, and where it holds
    offset: int
    room: int | None  # what is left of the limit
    base: int
    shift: int

    @property
    def parts(self) -> list[list[int]]:
        blocks = (list(block.values()) for block in self.blocks.values())
        offset = [[self.offset]] if self.offset else []
        return [*self.single, *blocks, *map(list, self.joint.values()), *offset]


def _raised(quantity: Quantity, limit: float | None, base: int) -> _Raised:
    low = [min(terms) for terms in quantity.single]
    dips = {at: min(0, *block.values()) for at, block in quantity.blocks.items()}
    found = _Raised(
        [[t - a for t in s] for s, a in zip(quantity.single, low, strict=True)],
        {
            at: {ij: block.get(ij, 0) - dips[at] for ij in _cells(quantity, at)}
            for at, block in quantity.blocks.items()
        },
        {m: (max(-term, 0), max(term, 0)) for m, term in quantity.joint.items()},
        quantity.least - base,
        None if limit is None else _floor(limit, quantity.shift) - base,
        base,
        quantity.shift,
    )
    room = found.room
    return found if room is None else replace(found, room=min(room, _most(found.parts, room)))


def _rounded(raised: _Raised, bits: int, *, up: bool = False, step: int | None = None) -> Row:
    parts, room = raised.parts, raised.room
    step = step or _step(parts, room, min(bits, SUM_BITS - len(parts).bit_length()))
    ints = {t: _divide(t, step, room, up=up) for part in parts for t in part}
    return Row(
        tuple(tuple(ints[t] for t in s) for s in raised.single),
        {at: {ij: ints[t] for ij, t in block.items()} for at, block in raised.blocks.items()},
        None if room is None else max(room // step, -1),
        raised.base,
        step,
        raised.shift,
        _divide(raised.offset, step, room, up=up),
        {m: (ints[fails], ints[holds]) for m, (fails, holds) in raised.joint.items()},
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


def _ratio(numerator: int, denominator: int) -> float:
    return numerator / denominator  # of integers: correctly rounded, whatever their size
