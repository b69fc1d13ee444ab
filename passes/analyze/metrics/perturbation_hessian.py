"""score[u, c] = Σ h_u · e_u(c)²,  h_u = |∇L(y_u + ε) − ∇L(y_u − ε)| / 2ε = |H_u 1|

Average perturbation Hessian (APHQ-ViT, arXiv 2504.02508): how the gradient by each element of a
result moves when all of them move alike; L is half the relative squared error of the outputs, whose
Hessian is H_u = J_uᵀ J_u / ‖y‖².  The paper weighs reconstructions of blocks with it; as a score of
choices it is ours.  Three walks of a suffix for each site.  Scaled to noise power.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mpq_fx.facts import Table
from mpq_fx.passes.analyze.calibrate import calibrated
from mpq_fx.passes.analyze.linearize import (
    linearize,
    local_errors,
    pull_back,
    push_forward,
    reached,
    relative_cotangents,
)
from mpq_fx.passes.analyze.metric import IsWanted, Record, Single, Task, averaged


def perturbation_hessian(task: Task) -> Table:
    """Squared local errors, weighed by the row sums of the Hessian."""

    def each(record: Record, is_wanted: IsWanted) -> Iterator[Single]:
        at = linearize(task.replay, record)
        weights = dict[str, Tensor]()
        for here in reached(task, record, is_wanted):
            moved = push_forward(task.replay, here, torch.ones_like(here.y))
            found = pull_back(at, relative_cotangents(task, at, moved), [here.site])
            weights[here.site] = found.get(here.site, torch.zeros_like(here.y)).abs()
        units = {unit for unit in task.units if any(site in weights for site in unit)}
        for unit, choice in task.changes(units.__contains__):
            errors = local_errors(task.replay, at, unit, choice)
            known = {site: error for site, error in errors.items() if site in weights}
            powers = (_power(weights[s], error) for s, error in known.items())
            yield Single(unit, choice, sum(powers))

    passes = 2 + 2.5 * len(task.replay.sites) + task.count / max(1, len(task.units))
    table = averaged("perturbation_hessian", task, each, forward_passes=passes)
    return calibrated(task, table)


def _power(weights: Tensor, error: Tensor) -> float:
    return float((weights.double() * error.double().square()).sum())
