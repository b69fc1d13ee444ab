"""float = integer / 2^k: a linear quantity in exact integers, over groups of units."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

Block = Mapping[tuple[int, int], int]  # (option of g, option of h) -> term
Meeting = tuple[tuple[int, tuple[int, ...]], ...]  # every group takes one of its options; >= 2


@dataclass(frozen=True)
class Quantity:
    """value(a) = (constant + Σ_g single[g][a_g] + Σ_{g<h} blocks[g, h][a_g, a_h]
    + Σ_m joint[m] · [a meets m]) / 2^shift, exactly.
    """

    single: tuple[tuple[int, ...], ...]
    blocks: Mapping[tuple[int, int], Block]
    shift: int
    constant: int = 0
    joint: Mapping[Meeting, int] = field(default_factory=dict)

    @cached_property
    def least(self) -> int:
        """No plan has less, in units of 2^-shift."""
        blocks = sum(min(0, *block.values()) for block in self.blocks.values())
        joint = sum(min(0, term) for term in self.joint.values())
        return self.constant + sum(map(min, self.single)) + blocks + joint

    @cached_property
    def most(self) -> int:
        """No plan has more, in units of 2^-shift."""
        blocks = sum(max(0, *block.values()) for block in self.blocks.values())
        joint = sum(max(0, term) for term in self.joint.values())
        return self.constant + sum(map(max, self.single)) + blocks + joint


def negative(quantity: Quantity) -> Quantity:
    """-quantity"""
    blocks = {at: {ij: -t for ij, t in block.items()} for at, block in quantity.blocks.items()}
    single = tuple(tuple(-t for t in terms) for terms in quantity.single)
    joint = {meeting: -t for meeting, t in quantity.joint.items()}
    return Quantity(single, blocks, quantity.shift, -quantity.constant, joint)


def kept(quantity: Quantity, left: Sequence[Sequence[int]]) -> Quantity:
    """The quantity over the options that are left of each group."""
    single = tuple(
        tuple(terms[i] for i in kept) for terms, kept in zip(quantity.single, left, strict=True)
    )
    blocks = {}
    for (g, h), block in quantity.blocks.items():
        pairs = ((a, b, i, j) for a, i in enumerate(left[g]) for b, j in enumerate(left[h]))
        left_of = {(a, b): block[i, j] for a, b, i, j in pairs if (i, j) in block}
        if left_of:
            blocks[g, h] = left_of
    joint = {}
    for meeting, term in quantity.joint.items():
        now = tuple(
            (g, tuple(k for k, i in enumerate(left[g]) if i in options)) for g, options in meeting
        )
        if all(options for _, options in now):
            joint[now] = joint.get(now, 0) + term
    return replace(quantity, single=single, blocks=blocks, joint=joint)


def shift_of(terms: Iterable[float]) -> int:
    """The least k such that every term is a multiple of 2^-k."""
    return max((x.as_integer_ratio()[1].bit_length() - 1 for x in map(float, terms)), default=0)


def exact(value: float, shift: int) -> int:
    """value · 2^shift"""
    numerator, denominator = float(value).as_integer_ratio()
    return (numerator << shift) // denominator
