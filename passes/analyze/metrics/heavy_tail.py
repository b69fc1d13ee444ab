"""score[u, c] = (median α / α_u) · mean ΔW_u(c)²,  α = 1 + k / Σ_{i<=k} ln(λ_i / λ_{k+1})

AlphaQ (arXiv 2606.04980): a weight whose spectrum has a heavier tail (a smaller α, by Hill's
estimate from the largest tenth of the eigenvalues λ of its tiles) is better trained, and counts
more.  Looks at weights alone: what a choice does to activations, and sites without a weight, cost
nothing here.  Scaled to noise power, which is the only use of data; `variation` in the provenance
says how far the scores of the units differ (below 0.02 the spectra tell nothing).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from statistics import fmean, median, pstdev

import torch
from torch import Tensor

from mpq_fx.facts import Choice, Site, Table
from mpq_fx.passes.analyze.calibrate import calibrated
from mpq_fx.passes.analyze.metric import IsWanted, Record, Single, Task, averaged
from mpq_fx.passes.analyze.replay import Replayer
from mpq_fx.passes.analyze.sites import OPERANDS

SIDE, MOST = 128, 256  # of a tile; tiles of one weight
TAIL, LEAST = 0.1, 10  # share and least number of the eigenvalues that are the tail


def heavy_tail(task: Task) -> Table:
    """Squared errors of weights, weighed by how heavy the tails of their spectra are."""
    replay, weights = task.replay, _weights(task.replay)
    alphas = {name: hill(spectrum(w)) for name, (_, w) in weights.items()}
    scores = {name: median(alphas.values()) / alpha for name, alpha in alphas.items()}

    def each(record: Record, is_wanted: IsWanted) -> Iterator[Single]:
        for unit, choice in task.changes(is_wanted):
            known = ((name, *weights[name]) for name in unit if name in weights)
            powers = (scores[n] * _mean_square(replay, site, choice, w) for n, site, w in known)
            yield Single(unit, choice, sum(powers))

    without_data = replace(task, records=task.records[:1])
    table = calibrated(task, averaged("heavy_tail", without_data, each, forward_passes=0))
    variation = pstdev(scores.values()) / fmean(scores.values()) if scores else 0.0
    return replace(table, provenance={**table.provenance, "variation": variation})


def hill(levels: Tensor) -> float:
    """1 + k / Σ ln(λ_i / λ_{k+1}) of the k largest of n values, k = max(10, n / 10)."""
    largest = levels.double().sort(descending=True).values.clamp_min(1e-30)
    count = len(largest)
    k = min(max(LEAST, int(TAIL * count), 1), count - 1)
    if k < 1:
        return 1.0
    steepness = float((largest[:k] / largest[k]).log().sum())
    return 1.0 + k / max(steepness, 1e-12)


def spectrum(w: Tensor) -> Tensor:
    """Squared singular values of the tiles of a weight, a smaller weight in one piece."""
    rows = w.detach().reshape(w.shape[0], -1).double()
    if min(rows.shape) < SIDE:
        return torch.linalg.svdvals(rows).square()
    tiles = rows.unfold(0, SIDE, SIDE).unfold(1, SIDE, SIDE).reshape(-1, SIDE, SIDE)
    if len(tiles) > MOST:
        drawn = torch.randperm(len(tiles), generator=torch.Generator().manual_seed(0))
        tiles = tiles[drawn[:MOST]]
    return torch.linalg.svdvals(tiles).square().reshape(-1)


def _weights(replay: Replayer) -> dict[str, tuple[Site, Tensor]]:
    """{name of a site: the site and its weight}, of those that have one."""
    found = {}
    for node in replay.gm.graph.nodes:
        site, operands = replay.sites.get(node.name), OPERANDS.get(str(node.target))
        if site is not None and operands is not None and site.weight_shape:
            found[site.name] = site, replay.constants[node.args[operands.weight]]
    return found


def _mean_square(replay: Replayer, site: Site, choice: Choice, w: Tensor) -> float:
    """mean ΔW²"""
    moved = replay.stored_weight(site, choice, w)
    replay.forget([site.name])
    return float((moved.double() - w.double()).square().mean())
