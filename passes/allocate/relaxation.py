"""max_λ>=0  Σ_g min_i (c[g, i] + Σ_r λ_r · a[r, g, i]) - Σ_r λ_r · B_r   <=   the best plan's cost.

A lower bound, a plan close to it, and the options that no better plan can use, in numpy; for
problems without pair terms, of any size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from mpq_fx.passes.allocate.exact import Form
from mpq_fx.passes.allocate.quantity import Quantity
from mpq_fx.passes.allocate.rows import Row, can_exceed, row_of

BITS = 52  # integers that float64 holds exactly
TIGHTEST = 16  # rows of one limit, the tightest: each takes as long as a budget
BISECTIONS, SWEEPS, STEPS, REPAIRS = 60, 4, 200, 60


@dataclass(frozen=True)
class Relaxation:
    """A bound, a plan (None if none was found), and how much each option alone adds to the bound.

    Picking option (g, i) costs at least `bound + extra[g][i]`.
    """

    bound: float
    picks: tuple[int, ...] | None
    extra: np.ndarray


@dataclass(frozen=True)
class Separable:
    """cost[g, i], use[r, g, i] >= 0 and limits[r] <= 1; cost is inf where there is no option.

    Uses are integers over a power of two, so that a plan within the limits is known exactly.
    """

    cost: np.ndarray
    use: np.ndarray
    limits: np.ndarray

    def at(self, table: np.ndarray, picks: np.ndarray) -> np.ndarray:
        return np.take_along_axis(table, picks[..., None], axis=-1)[..., 0]

    def spent(self, picks: np.ndarray) -> np.ndarray:
        """Use of each budget by the plan `picks`."""
        return np.array([self.at(use, picks).sum() for use in self.use])

    def priced(self, prices: np.ndarray) -> np.ndarray:
        """c + Σ_r λ_r · a_r"""
        return self.cost + np.tensordot(prices, self.use, axes=1)


def relax(form: Form, name: str, limits: Mapping[str, float]) -> Relaxation | None:
    """The Lagrangian relaxation of min `name` s.t. limits; None if a budget is out of reach."""
    assert not form.is_coupled, "the relaxation separates by unit only without pair terms"
    relaxed = relaxed_rows(form, name, limits)
    if relaxed is None:
        return None
    objective, rows = relaxed
    cost = _padded(objective.single, np.inf)
    use = np.zeros((len(rows), *cost.shape))
    for r, row in enumerate(rows):
        use[r] = _padded(row.single, 0.0) / row.full
    most = np.array([(row.limit or 0) / row.full for row in rows])
    unpayable = (use > most[:, None, None]).any(axis=0)
    arrays = Separable(np.where(unpayable, np.inf, cost), np.where(unpayable, 0.0, use), most)
    if not np.isfinite(arrays.cost.min(axis=1)).all():
        return None
    return in_units(_search(arrays), objective)


def relaxed_rows(
    form: Form, name: str, limits: Mapping[str, float]
) -> tuple[Row, tuple[Row, ...]] | None:
    """Objective and limits without joint terms; None if a limit is out of reach.

    Of an objective that is the largest of several parts the one that is largest at the least.
    Of the rows of a limit those count that some plan exceeds, at most TIGHTEST of them.
    """
    goal = max((shared_out(part) for part in form.quantities[name]), key=lambda part: part.least)
    rows: list[Row] = []
    for at, limit in limits.items():
        parts = (part for part in form.quantities[at] if can_exceed(part, limit))
        each = [row_of(shared_out(part), limit, bits=BITS) for part in parts]
        rows += sorted(each, key=_slack)[:TIGHTEST]
    if any(row.limit is None or row.limit < 0 for row in rows):
        return None
    return row_of(goal, None, bits=BITS), tuple(rows)


def _slack(row: Row) -> float:
    """The share of its worst case that a row allows."""
    return (row.limit or 0) / max(row.most, 1)


def shared_out(quantity: Quantity) -> Quantity:
    """Never more than the quantity: of a saving that n groups make together each makes an n-th; a
    cost that they have together is left out.

    [all take it] <= the mean of [each takes it].
    """
    single = [list(terms) for terms in quantity.single]
    for meeting, term in quantity.joint.items():
        for g, options in meeting:
            for i in options:
                single[g][i] += min(term, 0) // len(meeting)
    return replace(quantity, single=tuple(map(tuple, single)), joint={})


def _padded(rows: tuple[tuple[int, ...], ...], fill: float) -> np.ndarray:
    table = np.full((len(rows), max(map(len, rows), default=1)), fill)
    for g, row in enumerate(rows):
        table[g, : len(row)] = row
    return table


def in_units(found: Relaxation, objective: Row) -> Relaxation:
    """Integers of the objective's row -> the quantity's own unit.

    Rows have integer values, so that both the bound and what it is with an option are rounded up.
    """
    # The float error of a sum of terms >= 0 is far below 1e-12 of it.
    least = max(math.ceil(found.bound * (1 - 1e-12) - 1e-6), 0)
    with_option = np.ceil((found.bound + found.extra) * (1 - 1e-12) - 1e-6)
    extra = np.maximum(with_option - least, 0.0) * objective.unit
    return Relaxation(objective.bound(least), found.picks, extra)


def _search(arrays: Separable) -> Relaxation:
    prices = ascend(arrays, np.zeros(len(arrays.use)))
    best, value = prices, dual(arrays, prices)[0]
    picks = primal(arrays, prices)
    if len(prices) > 1:
        target = value if picks is None else float(arrays.at(arrays.cost, picks).sum())
        best, value = polish(arrays, prices, target)
        picks = _cheaper(arrays, picks, primal(arrays, best))
    priced = arrays.priced(best)
    extra = priced - priced.min(axis=1, keepdims=True)
    return Relaxation(value, None if picks is None else tuple(map(int, picks)), extra)


def dual(arrays: Separable, prices: np.ndarray) -> tuple[float, np.ndarray]:
    """The dual value and its picks, which are also its slope: spent - limits."""
    priced = arrays.priced(prices)
    picks = priced.argmin(axis=1)
    return float(arrays.at(priced, picks).sum() - prices @ arrays.limits), picks


def ascend(arrays: Separable, prices: np.ndarray) -> np.ndarray:
    """Coordinate ascent: for one budget at a time, the smallest price at which it is met."""
    prices = prices.copy()
    for _ in range(SWEEPS if len(prices) > 1 else 1):
        for r in range(len(prices)):
            prices[r] = _price(arrays, prices.copy(), r)
    return prices


def _price(arrays: Separable, prices: np.ndarray, r: int) -> float:
    def is_met(price: float) -> bool:
        prices[r] = price
        return arrays.spent(dual(arrays, prices)[1])[r] <= arrays.limits[r]

    if is_met(0.0):
        return 0.0
    low, high = 0.0, max(float(arrays.cost[np.isfinite(arrays.cost)].max()), 1.0)
    while not is_met(high) and high < 1e30:
        low, high = high, high * 8.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if is_met(middle) else (middle, high)
    return high


def polish(arrays: Separable, prices: np.ndarray, target: float) -> tuple[np.ndarray, float]:
    """Polyak steps toward the cost of a known plan: coordinate ascent can stop at a kink."""
    best, value = prices, -np.inf
    pace = 1.0
    for _ in range(STEPS):
        reached, picks = dual(arrays, prices)
        improved = reached > value
        best, value = (prices, reached) if improved else (best, value)
        pace = pace if improved else pace * 0.95
        slope = arrays.spent(picks) - arrays.limits
        length = float(slope @ slope)
        if length == 0.0 or target <= value:
            break
        prices = np.maximum(prices + pace * (target - reached) / length * slope, 0.0)
    return best, value


def primal(arrays: Separable, prices: np.ndarray) -> np.ndarray | None:
    """A plan within the budgets, from the picks at these prices."""
    picks = _repair(arrays, prices, dual(arrays, prices)[1])
    return None if picks is None else _fill(arrays, picks)


def _cheaper(
    arrays: Separable, first: np.ndarray | None, second: np.ndarray | None
) -> np.ndarray | None:
    plans = [p for p in (first, second) if p is not None]
    return min(plans, key=lambda p: float(arrays.at(arrays.cost, p).sum()), default=None)


def _repair(arrays: Separable, prices: np.ndarray, picks: np.ndarray) -> np.ndarray | None:
    """Cheapest moves per unit of relief on the most overspent budget, until all are met."""
    picks = picks.copy()
    rows = np.arange(len(picks))
    priced = arrays.priced(prices)
    for _ in range(REPAIRS):
        excess = arrays.spent(picks) - arrays.limits
        r = int(excess.argmax()) if len(excess) else -1
        if r < 0 or excess[r] <= 0.0:
            return picks
        relief = arrays.at(arrays.use[r], picks)[:, None] - arrays.use[r]
        loss = priced - arrays.at(priced, picks)[:, None]
        ratio = np.full_like(loss, np.inf)
        np.divide(loss, relief, out=ratio, where=relief > 0)
        move = ratio.argmin(axis=1)
        order = np.argsort(ratio[rows, move], kind="stable")
        order = order[np.isfinite(ratio[order, move[order]])]
        needed = np.searchsorted(relief[order, move[order]].cumsum(), excess[r])
        moved = order[: needed + 1]
        picks[moved] = move[moved]
    return None


def _fill(arrays: Separable, picks: np.ndarray) -> np.ndarray:
    """Spend what is left: the largest saving that still fits, one group at a time."""
    left = arrays.limits - arrays.spent(picks)
    saving = arrays.at(arrays.cost, picks)[:, None] - arrays.cost
    for at in np.argsort(-saving, axis=None, kind="stable"):
        g, i = divmod(int(at), saving.shape[1])
        if saving[g, i] <= 0.0:
            break
        extra = arrays.use[:, g, i] - arrays.use[:, g, picks[g]]
        if arrays.cost[g, i] < arrays.cost[g, picks[g]] and (extra <= left).all():
            picks[g], left = i, left - extra
    return picks
