"""score[u, c] = (1 − mean of ρ(y_u, y_v) over the other sites v) · ‖e_u(c)‖² / ‖y_u‖²

Correlation-based sensitivity (CPTQuant's CMPQ, arXiv 2412.03599): a layer whose result tells what
the other layers tell can be coarse, one that is on its own gets more bits.  ρ is the mean canonical
correlation of the leading principal directions of two results (Raghu et al., arXiv 1706.05806),
over positions where both have as many, else over samples.  One forward pass, no suffix.  Scaled to
noise power; sites that no other site could be compared with are listed in the provenance, and count
as uncorrelated.

Reconstruction: public is that precision follows from canonical correlations of different layers;
the number of directions, the mean and the relative error of the choice are ours.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from torch import Tensor

from mpq_fx.facts import Site, Table
from mpq_fx.passes.analyze.calibrate import calibrated
from mpq_fx.passes.analyze.linearize import Linearized, linearize
from mpq_fx.passes.analyze.metric import IsWanted, Record, Single, Task, averaged
from mpq_fx.passes.analyze.metrics.local_error import weighed

DIRECTIONS, PER_DIRECTION = 16, 4  # most directions of a result; observations that each one needs
ROWS = 1024  # observations of one result, evenly spaced
CONSTANT = 1e-6  # of the norm: singular values below are the rounding of something constant


def canonical_correlation(task: Task) -> Table:
    """How little the other layers tell of a layer, times the relative error of the choice."""
    alone = set[str]()

    def each(record: Record, is_wanted: IsWanted) -> Iterator[Single]:
        at = linearize(task.replay, record)
        means = mean_correlations({site.name: site for site in task.replay.sites.values()}, at)
        scores = {name: 1.0 - means.get(name, 0.0) for name in at.results}
        for single in weighed(task, at, scores, is_wanted):
            flags = [site in at.results and site not in means for site in single.unit]
            yield single._replace(row=torch.tensor(flags))

    def keep(given: Sequence[Single]) -> None:
        for single in given:
            flags = () if single.row is None else single.row.tolist()
            alone.update(
                site for site, is_alone in zip(single.unit, flags, strict=True) if is_alone
            )

    passes = 1 + task.count / max(1, len(task.units))
    averages = averaged("canonical_correlation", task, each, forward_passes=passes, keep=keep)
    table = calibrated(task, averages)
    return replace(table, provenance={**table.provenance, "uncompared": sorted(alone)})


def mean_correlations(sites: Mapping[str, Site], at: Linearized) -> dict[str, float]:
    """{site: mean over the other sites of the correlation}, of those that have one"""
    views = {name: view_of(sites[name], y, at.samples) for name, y in at.results.items()}
    found: dict[str, list[float]] = {}
    for (u, one), (v, two) in itertools.combinations(views.items(), 2):
        is_aligned = one.positions == two.positions
        bases = (x.by_position if is_aligned else x.by_sample for x in (one, two))
        rho = correlation(*bases)
        if rho is not None:
            found.setdefault(u, []).append(rho)
            found.setdefault(v, []).append(rho)
    return {name: fmean(seen) for name, seen in found.items()}


@dataclass(frozen=True)
class View:
    """Leading principal directions of a result, over its positions, and over samples' means."""

    positions: int
    by_position: Tensor
    by_sample: Tensor


def view_of(site: Site, y: Tensor, samples: int) -> View:
    """A result as observations of its channels: dimension 1 of feature maps, else the last."""
    channel = -3 if site.op == "residual" else -1
    channel = 1 - len(site.weight_shape) if site.op.startswith("conv") else channel
    x = y.detach().double().movedim(channel, -1).reshape(-1, y.shape[channel])
    samples = samples if len(x) % samples == 0 else 1
    return View(len(x), leading(x), leading(x.reshape(samples, -1, x.shape[1]).mean(1)))


def leading(x: Tensor) -> Tensor:
    """[rows, k]: orthonormal, the leading principal directions of [rows, channels]

    k is at most DIRECTIONS and a PER_DIRECTION-th of the rows; 0 where nothing varies, or where a
    value is not finite, as attention makes of a row that is masked out.
    """
    x = x[:: max(1, -(-len(x) // ROWS))]
    if not bool(x.isfinite().all()):
        return x[:, :0]
    vectors, levels, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    kept = int((levels > CONSTANT * x.norm()).sum())
    return vectors[:, : min(DIRECTIONS, len(x) // PER_DIRECTION, kept)]


def correlation(one: Tensor, two: Tensor) -> float | None:
    """Mean canonical correlation of two orthonormal bases, the mean singular value of oneᵀ two;
    None where one of them is empty.
    """
    if not one.shape[1] or not two.shape[1]:
        return None
    return float(torch.linalg.svdvals(one.T @ two).clamp(max=1.0).mean())
