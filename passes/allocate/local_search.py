"""A plan close to given picks: each group at its best beside the others, then exchanges of two."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpq_fx.passes.allocate.arrays import Arrays, Neighbors, Priced, neighbors_of

DESCENTS, SHARES, DOUBLINGS = 30, 12, 40
LEAST = 1e-6  # price of a budget, as a share of the largest cost
EXCHANGES = 1000  # at most: each lowers the cost
POOL = 200  # moves that are tried two at a time: those that waste least at the prices
TRIES = 10  # of the best two moves, whose groups may share a pair


def local_search(
    arrays: Arrays, prices: np.ndarray, starts: Sequence[np.ndarray]
) -> np.ndarray | None:
    """A plan within the budgets that neither a move nor most exchanges make cheaper, or None.

    `prices` of the budgets say what a move wastes.  Deterministic.
    """
    plans = [p for p in (*starts, _within(arrays, prices, starts[0])) if p is not None]
    plans = [picks for picks in plans if _fits(arrays, arrays.spent(picks))]
    if not plans:
        return None
    found = min(plans, key=lambda picks: float(arrays.spent(picks)[0]))
    for _ in range(EXCHANGES):
        moved = _move(arrays, prices, found)
        if moved is None:
            break
        found = moved
    return np.minimum(found, arrays.sizes - 1)


def _fits(arrays: Arrays, spent: np.ndarray) -> bool:
    """Does (cost, use of each budget) keep to the budgets?"""
    return bool((spent[1:] <= arrays.limits).all())


def _within(arrays: Arrays, prices: np.ndarray, start: np.ndarray) -> np.ndarray | None:
    """The cheapest that fits of the plans at a multiple of the prices: the relaxation's are too low
    where its pairs pick what its groups do not.
    """
    groups = neighbors_of(arrays)
    prices = np.maximum(prices, LEAST * max(float(np.abs(arrays.single[0]).max()), 1.0))
    low, high = 0.0, 1.0
    best, cost, picks = None, np.inf, start
    for _ in range(DOUBLINGS + SHARES):
        share = high if best is None else (low + high) / 2
        picks = _descend(arrays.priced(share * prices), groups, picks)
        spent = arrays.spent(picks)
        fits = _fits(arrays, spent)
        if fits and spent[0] < cost:
            best, cost = picks, spent[0]
        if best is None:
            low, high = high, 2 * high
        elif fits:
            high = share
        else:
            low = share
    return best


def _descend(priced: Priced, groups: Sequence[Neighbors], picks: np.ndarray) -> np.ndarray:
    picks = picks.copy()
    for _ in range(DESCENTS):
        before = picks.copy()
        for group in groups:
            picks[group.index] = priced.beside(group, picks).argmin()
        if (picks == before).all():
            break
    return picks


def _move(arrays: Arrays, prices: np.ndarray, picks: np.ndarray) -> np.ndarray | None:
    """The plan after the move, or the two moves, that save most and fit."""
    now = arrays.spent(picks)
    change = arrays.beside(picks)
    change -= np.take_along_axis(change, picks[None, :, None], axis=2)
    left = arrays.limits - now[1:]
    fits = (change[1:] <= left[:, None, None]).all(axis=0)
    best = np.where(fits, change[0], 0.0)
    if best.min() < 0.0:
        return _moved(picks, [int(best.argmin())], best.shape[1])
    wasted = np.tensordot(np.array([1.0, *prices]), change, axes=1)
    wasted[np.arange(len(picks)), picks] = np.inf
    pool = np.argsort(wasted, axis=None, kind="stable")[:POOL]
    both = change.reshape(len(change), -1)[:, pool]
    both = both[:, :, None] + both[:, None, :]
    options = wasted.shape[1]
    apart = pool[:, None] // options != pool // options
    fits = apart & (both[1:] <= left[:, None, None]).all(axis=0)
    saved = np.where(fits, both[0], 0.0)
    for at in np.argsort(saved, axis=None, kind="stable")[: 2 * TRIES : 2]:
        if saved.flat[at] >= 0.0:
            return None
        trial = _moved(picks, [int(pool[k]) for k in divmod(int(at), len(pool))], options)
        spent = arrays.spent(trial)
        if spent[0] < now[0] and _fits(arrays, spent):
            return trial
    return None


def _moved(picks: np.ndarray, moves: Sequence[int], options: int) -> np.ndarray:
    picks = picks.copy()
    for move in moves:
        group, option = divmod(move, options)
        picks[group] = option
    return picks
