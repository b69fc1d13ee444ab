"""score[u, c] = ‖y(u pruned) − y‖² / ‖y‖² · ‖e_u(c)‖² / ‖y_u‖²

Pruning-based sensitivity (CPTQuant's PMPQ, arXiv 2412.03599): the half of a layer's weights that is
smallest is set to zero, in this layer alone, and a layer that suffers from it gets more bits.  A
site without a weight loses the half of its result that is smallest.  One walk of a suffix for each
site.  Scaled to noise power.

Reconstruction: public is that layers are ranked by their sensitivity to sparsity; the share, the
error of the outputs in place of an accuracy, and the relative error of the choice are ours.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mpq_fx.facts import Table
from mpq_fx.passes.analyze.calibrate import calibrated
from mpq_fx.passes.analyze.linearize import Linearized, linearize, reached
from mpq_fx.passes.analyze.metric import IsWanted, Record, Single, Task, averaged
from mpq_fx.passes.analyze.metrics.local_error import weighed
from mpq_fx.passes.analyze.replay import Replayer, call, output_error
from mpq_fx.passes.analyze.sites import OPERANDS

SHARE = 0.5  # of the values that are set to zero


def pruning(task: Task) -> Table:
    """What pruning a layer does to the outputs, times the relative error of the choice."""

    def each(record: Record, is_wanted: IsWanted) -> Iterator[Single]:
        at = linearize(task.replay, record)
        scores = dict[str, float]()
        for here in reached(task, record, is_wanted):
            env = {**here.env, here.node: pruned_result(task.replay, at, here.site)}
            outputs = task.replay.finish(env, here.rest, {})
            scores[here.site] = output_error(outputs, at.outputs, task.excluded) ** 2
        units = {unit for unit in task.units if any(site in scores for site in unit)}
        yield from weighed(task, at, scores, units.__contains__)

    passes = 2 + len(task.replay.sites) / 2 + task.count / max(1, len(task.units))
    return calibrated(task, averaged("pruning", task, each, forward_passes=passes))


def pruned_result(replay: Replayer, at: Linearized, name: str) -> Tensor:
    """The result of a site with its weight pruned; without a weight, its result pruned."""
    node, args, kwargs = at.operands[name]
    if not replay.sites[node.name].weight_shape:
        return pruned(at.results[name].detach())
    place = OPERANDS[str(node.target)].weight
    given = [pruned(x) if k == place else x for k, x in enumerate(args)]
    with torch.no_grad():
        return call(node, given, kwargs)


def pruned(x: Tensor) -> Tensor:
    """x with the SHARE of it that is smallest in magnitude set to zero; zeros go first."""
    sizes = x.reshape(-1).abs()
    count = int(SHARE * x.numel())
    if count == 0:
        return x
    last = sizes.kthvalue(count).values
    dropped = sizes < last
    equal = (sizes == last).nonzero().squeeze(1)
    dropped[equal[: count - int(dropped.sum())]] = True  # all of a binary weight are equal
    return x.clone().masked_fill_(dropped.view_as(x), 0.0)  # with the strides of x, for views
