"""quantity(a) = Σ_g single[g, a_g] + Σ_e pair[e, a_g, a_h],  e = (g, h): pairs in numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mpq_fx.passes.allocate.exact import Form
from mpq_fx.passes.allocate.rows import Row


@dataclass(frozen=True)
class Arrays:
    """single[0, g, i] and pair[0, e, i, j] cost; rows 1, 2, … are budgets, with limits up to 1.

    A group of fewer options repeats its last one.  ends[e] = (g, h).
    """

    single: np.ndarray
    pair: np.ndarray
    ends: np.ndarray
    sizes: np.ndarray
    limits: np.ndarray

    def priced(self, prices: np.ndarray) -> Priced:
        weights = np.array([1.0, *prices])
        single = np.tensordot(weights, self.single, axes=1)
        return Priced(single, np.tensordot(weights, self.pair, axes=1), self.ends)

    def spent(self, picks: np.ndarray) -> np.ndarray:
        """Cost and use of each budget by a plan."""
        both = picks[self.ends]
        single = self.single[:, np.arange(len(picks)), picks].sum(axis=1)
        return single + self.pair[:, np.arange(len(both)), both[:, 0], both[:, 1]].sum(axis=1)

    def beside(self, picks: np.ndarray) -> np.ndarray:
        """[r, g, i]: what option i of g adds to each quantity while all others keep their picks."""
        found = self.single.copy()
        rows, (first, second) = np.arange(len(self.ends)), self.ends.T
        for r in range(len(found)):
            np.add.at(found[r], first, self.pair[r, rows, :, picks[second]])
            np.add.at(found[r], second, self.pair[r, rows, picks[first], :])
        return found


@dataclass(frozen=True)
class Priced:
    """θ of groups and pairs for fixed prices."""

    single: np.ndarray
    pair: np.ndarray
    ends: np.ndarray

    @cached_property
    def facing(self) -> np.ndarray:
        """[e, s, i, j]: i is the option of end s, j that of the other end."""
        return np.stack([self.pair, self.pair.swapaxes(1, 2)], axis=1)

    def moved(self, messages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """θ with the messages added to the groups and taken from the pairs."""
        single = received(self.single, self.ends, messages)
        return single, self.pair - messages[:, 0, :, None] - messages[:, 1, None, :]

    def beside(self, group: Neighbors, picks: np.ndarray) -> np.ndarray:
        """What each option of a group costs while all others keep their picks."""
        pairs = self.facing[group.pairs, group.sides, :, picks[group.others]]
        return self.single[group.index] + pairs.sum(axis=0)


@dataclass(frozen=True)
class Neighbors:
    """The pairs of one group: at which of their ends it stands, and who stands at the other."""

    index: int
    pairs: np.ndarray
    sides: np.ndarray
    others: np.ndarray


def received(single: np.ndarray, ends: np.ndarray, messages: np.ndarray) -> np.ndarray:
    """single[g] + Σ_e messages[e, g]"""
    found = single.copy()
    np.add.at(found, ends, messages)
    return found


def arrays_of(form: Form, objective: Row, budgets: Sequence[Row]) -> Arrays:
    """The rows of a form as arrays; a budget is divided by a power of two above its limit."""
    sizes = np.array([len(group.options) for group in form.groups])
    most = int(sizes.max(initial=1))
    rows = (objective, *budgets)
    ends = list(dict.fromkeys(at for row in rows for at in row.blocks))
    repeated = np.minimum(np.arange(most), sizes[:, None] - 1)
    single = np.zeros((len(rows), len(sizes), most))
    pair = np.zeros((len(rows), len(ends), most, most))
    for r, row in enumerate(rows):
        one = 1.0 if r == 0 else row.full
        for g, terms in enumerate(row.single):
            single[r, g] = np.array(terms, dtype=float)[repeated[g]] / one
        for e, (g, h) in enumerate(ends):
            block = np.zeros((sizes[g], sizes[h]))
            for at, term in row.blocks.get((g, h), {}).items():
                block[at] = term
            pair[r, e] = block[np.ix_(repeated[g], repeated[h])] / one
    limits = np.array([(row.limit or 0) / row.full for row in budgets])
    return Arrays(single, pair, np.array(ends, dtype=int).reshape(-1, 2), sizes, limits)


def neighbors_of(arrays: Arrays) -> list[Neighbors]:
    """The pairs of each group, in the order of the groups."""
    found: list[list[tuple[int, int]]] = [[] for _ in arrays.sizes]
    for e, (g, h) in enumerate(arrays.ends.tolist()):
        found[g].append((e, 0))
        found[h].append((e, 1))
    made = []
    for g, at in enumerate(found):
        pairs, sides = np.array(at, dtype=int).reshape(-1, 2).T
        made.append(Neighbors(g, pairs, sides, arrays.ends[pairs, 1 - sides]))
    return made
