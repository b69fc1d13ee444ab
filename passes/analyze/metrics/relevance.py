"""score[u, c] = mean over calls of Σ |R_u| · ‖e_u(c)‖² / ‖y_u‖²,  R_u = y_u ⊙ ∂(target logits)/∂y_u

Layer-wise relevance (LRP-QViT, arXiv 2401.11243): how much of the predicted class's logit passes
through a site, times the relative error that a choice makes there.  R is the ε-rule of LRP with
ε → 0 where a graph is piecewise linear; other ops (softmax, norms) pass their gradient instead of a
rule of their own.  One walk back for all sites and choices.  Scaled to noise power.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mpq_fx.facts import Table
from mpq_fx.passes.analyze.calibrate import calibrated
from mpq_fx.passes.analyze.linearize import Linearized, linearize, pull_back
from mpq_fx.passes.analyze.metric import IsWanted, Record, Single, Task, averaged
from mpq_fx.passes.analyze.metrics.local_error import weighed
from mpq_fx.passes.analyze.replay import is_logits


def relevance(task: Task) -> Table:
    """Share of the relevance that passes through a unit, times its relative error."""

    def each(record: Record, is_wanted: IsWanted) -> Iterator[Single]:
        at = linearize(task.replay, record)
        passed = relevances(task, at)
        total = sum(float(r.abs().sum()) for r in passed.values()) or 1.0
        shares = {site: float(r.abs().sum()) / total for site, r in passed.items()}
        yield from weighed(task, at, shares, is_wanted)

    passes = 3 + task.count / max(1, len(task.units))
    return calibrated(task, averaged("relevance", task, each, forward_passes=passes))


def relevances(task: Task, at: Linearized) -> dict[str, Tensor]:
    """{site: R}; in a net of matmuls without bias and ReLUs each sums to the target logits."""
    found = pull_back(at, [_target(task, k, y) for k, y in enumerate(at.outputs)])
    return {site: at.results[site].detach().double() * g.double() for site, g in found.items()}


def _target(task: Task, k: int, y: object) -> Tensor | None:
    """1 at the largest number along the last dimension of an output, 0 elsewhere."""
    if k in task.excluded or not is_logits(y):
        return None
    assert isinstance(y, Tensor)
    with torch.no_grad():
        return torch.zeros_like(y).scatter_(-1, y.argmax(-1, keepdim=True), 1.0)
