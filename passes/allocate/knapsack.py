"""max Σ_i score[i, a_i]  s.t.  Σ_i cells[i, a_i] <= budget: dynamic programming in whole cells"""

from __future__ import annotations

import numpy as np


def knapsack(score: np.ndarray, cells: np.ndarray, budget: int) -> np.ndarray:
    """The best option of every row.  Each row must have an option of 0 cells.

    best[b] is the largest score of the rows so far within b cells; N · K steps over the budget.
    """
    rows = len(score)
    best = np.zeros(budget + 1)
    chosen = np.zeros((rows, budget + 1), dtype=int)
    for i in range(rows):
        trials = np.full((score.shape[1], budget + 1), -np.inf)
        for k, used in enumerate(cells[i]):
            if used <= budget:
                trials[k, used:] = best[: budget + 1 - used] + score[i, k]
        chosen[i] = trials.argmax(axis=0)
        best = np.take_along_axis(trials, chosen[i][None], axis=0)[0]
    picks, left = np.zeros(rows, dtype=int), budget
    for i in reversed(range(rows)):
        picks[i] = chosen[i, left]
        left -= cells[i, picks[i]]
    return picks


def cells_of(costs: np.ndarray, budget: float, resolution: int) -> np.ndarray:
    """Costs above the cheapest of their row, in `resolution` parts of what the cheapest leave.

    Rounded up, so that what fits in cells fits in floats.
    """
    least = costs.min(axis=1, keepdims=True)
    left = budget - float(least.sum())
    if left <= 0.0:
        return np.where(costs == least, 0, resolution + 1)
    cells = np.ceil((costs - least) / left * resolution * (1 - 1e-12))
    return np.minimum(cells, resolution + 1).astype(int)
