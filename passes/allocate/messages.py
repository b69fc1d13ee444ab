"""max_λ>=0,m  Σ_g min_i (θ[g, i] + Σ_e m[e, g, i]) + Σ_e min_ij (θ[e, i, j]
            - m[e, g, i] - m[e, h, j]) - Σ_r λ_r · B_r  <=  the best plan's cost,
θ = cost + Σ_r λ_r · use_r, of groups g and of pairs e = (g, h).

Messages m move what a pair costs in any case into the single terms, so that the relaxation
separates; sent along an order and back, they never lower the bound (TRW-S, Kolmogorov 2006, in the
form of SRMP, 2015).  In numpy, for terms of either sign, in objective and budgets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mpq_fx.passes.allocate.arrays import (
    Arrays,
    Neighbors,
    Priced,
    arrays_of,
    neighbors_of,
    received,
)
from mpq_fx.passes.allocate.exact import Form
from mpq_fx.passes.allocate.local_search import local_search
from mpq_fx.passes.allocate.relaxation import (
    Relaxation,
    Separable,
    ascend,
    dual,
    in_units,
    polish,
    primal,
    relaxed_rows,
)

VISITS = 10_000  # of a group by messages, in a second
GUESS = 0.05  # how far above the bound a plan may be, where none is known
ROUNDS, PATIENCE, PROGRESS = 200, 5, 1e-4  # until the bound rises by less than this share of itself


def relax_pairs(
    form: Form, name: str, limits: Mapping[str, float], *, seconds: float = 10.0
) -> Relaxation | None:
    """The relaxation of min `name` s.t. limits; None if a budget is out of reach.

    Takes as many steps as fit into about `seconds`, whatever the machine's load.
    """
    relaxed = relaxed_rows(form, name, limits)
    if relaxed is None:
        return None
    objective, budgets = relaxed
    arrays = arrays_of(form, objective, budgets)
    prices, messages = _ascend(arrays, int(VISITS * seconds))
    value, extra = _bound(arrays, prices, messages)
    picks = _plan(arrays, prices, messages)
    found = Relaxation(value, None if picks is None else tuple(map(int, picks)), extra)
    return in_units(found, objective)


def _ascend(arrays: Arrays, visits: int) -> tuple[np.ndarray, np.ndarray]:
    """Prices and messages by turns, while the bound rises."""
    groups = neighbors_of(arrays)
    messages = np.zeros((len(arrays.ends), 2, arrays.single.shape[-1]))
    prices = ascend(_separated(arrays, messages), np.zeros(len(arrays.single) - 1))
    plan = _plan(arrays, prices, messages)
    target = np.inf if plan is None else float(arrays.spent(plan)[0])
    prices = _repriced(arrays, prices, messages, target)
    best = _Best(-np.inf, prices, messages)
    risen = [-np.inf]
    for _ in range(min(ROUNDS, 1 + visits // max(2 * len(groups), 1))):
        priced = arrays.priced(prices)
        for order in (groups, groups[::-1]):
            _send(priced, order, messages)
        prices = _repriced(arrays, prices, messages, target)
        value, _ = _bound(arrays, prices, messages)
        best = max(best, _Best(value, prices, messages.copy()), key=lambda at: at.value)
        risen.append(best.value)
        if len(risen) > PATIENCE and risen[-1] - risen[-PATIENCE] <= PROGRESS * abs(risen[-1]):
            break
    return best.prices, best.messages


@dataclass(frozen=True)
class _Best:
    value: float
    prices: np.ndarray
    messages: np.ndarray


def _repriced(
    arrays: Arrays, prices: np.ndarray, messages: np.ndarray, target: float
) -> np.ndarray:
    """Better prices for given messages: the best of one budget, steps toward those of several."""
    separated = _separated(arrays, messages)
    if len(prices) < 2:
        return ascend(separated, prices)
    value, _ = _bound(arrays, prices, messages)
    above = target - value if np.isfinite(target) else GUESS * abs(value)
    return polish(separated, prices, dual(separated, prices)[0] + max(above, 0.0))[0]


def _plan(arrays: Arrays, prices: np.ndarray, messages: np.ndarray) -> np.ndarray | None:
    """A plan near the picks at these prices."""
    groups = _groups_alone(arrays, messages)
    relaxed = groups.priced(prices).argmin(axis=1)
    repaired = primal(groups, prices)
    return local_search(arrays, prices, [relaxed, *([] if repaired is None else [repaired])])


def _groups_alone(arrays: Arrays, messages: np.ndarray) -> Separable:
    """The groups with what messages moved into them, and without what is left of the pairs."""
    return Separable(
        received(arrays.single[0], arrays.ends, messages), arrays.single[1:], arrays.limits
    )


def _separated(arrays: Arrays, messages: np.ndarray) -> Separable:
    """For fixed messages a pair is one more group, whose options are those of both its ends."""
    groups = _groups_alone(arrays, messages)
    if not arrays.pair[1:].any():
        return groups  # what is left of pairs does not depend on prices
    pair = arrays.pair.copy()
    pair[0] -= messages[:, 0, :, None] + messages[:, 1, None, :]
    flat = pair.reshape(*pair.shape[:2], -1)
    missing = flat.shape[-1] - groups.cost.shape[-1]
    cost = np.pad(groups.cost, ((0, 0), (0, missing)), constant_values=np.inf)
    use = np.pad(groups.use, ((0, 0), (0, 0), (0, missing)))
    both = np.concatenate([cost, flat[0]]), np.concatenate([use, flat[1:]], axis=1)
    return Separable(*both, arrays.limits)


def _send(priced: Priced, order: Sequence[Neighbors], messages: np.ndarray) -> None:
    """Each group takes all that its pairs can give, and hands an equal share on along the order."""
    first, last = order[0].index, order[-1].index
    for group in order:
        if not len(group.pairs):
            continue
        there = messages[group.pairs, 1 - group.sides]
        given = (priced.facing[group.pairs, group.sides] - there[:, None, :]).min(axis=2)
        total = priced.single[group.index] + given.sum(axis=0)
        later = group.others > group.index if first < last else group.others < group.index
        share = max(int(later.sum()), len(later) - int(later.sum()))
        given[later] -= (total - total.min()) / share
        messages[group.pairs, group.sides] = given


def _bound(arrays: Arrays, prices: np.ndarray, messages: np.ndarray) -> tuple[float, np.ndarray]:
    """The dual value, less what float sums may be wrong by, and what each option adds to it."""
    single, pair = arrays.priced(prices).moved(messages)
    least, left = single.min(axis=1), pair.min(axis=(1, 2))
    value = float(least.sum() + left.sum() - prices @ arrays.limits)
    doubt = 1e-12 * float(np.abs(single).max(axis=1).sum() + np.abs(pair).max(axis=(1, 2)).sum())
    return value - doubt, single - least[:, None]
