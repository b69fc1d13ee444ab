"""noise[u, c] = ‖y_u(c) − y_u‖² / ‖y_u‖²: what a choice does to the result of its own site

One forward pass and no suffix: the cheapest metric that looks at data.  It does not know how much
of an error reaches the outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from mpq_fx.facts import Table
from mpq_fx.passes.analyze.calibrate import calibrated
from mpq_fx.passes.analyze.linearize import Linearized, linearize, local_errors
from mpq_fx.passes.analyze.metric import IsWanted, Record, Single, Task, averaged


def local_error(task: Task) -> Table:
    """Relative error of each site's own result, squared; scaled to errors of the outputs."""

    def each(record: Record, is_wanted: IsWanted) -> Iterator[Single]:
        at = linearize(task.replay, record)
        for unit, choice in task.changes(is_wanted):
            errors = local_errors(task.replay, at, unit, choice)
            powers = (relative_power(e, at.results[s]) for s, e in errors.items())
            yield Single(unit, choice, sum(powers))

    passes = 1 + task.count / max(1, len(task.units))
    return calibrated(task, averaged("local_error", task, each, forward_passes=passes))


def weighed(
    task: Task, at: Linearized, scores: Mapping[str, float], is_wanted: IsWanted
) -> Iterator[Single]:
    """Σ score_u · ‖e_u(c)‖² / ‖y_u‖² over the sites of a unit; those without a score add nothing.

    How a score of layers becomes one of choices: what ranks layers says nothing of their formats.
    """
    for unit, choice in task.changes(is_wanted):
        errors = local_errors(task.replay, at, unit, choice)
        powers = (scores.get(s, 0.0) * relative_power(e, at.results[s]) for s, e in errors.items())
        yield Single(unit, choice, sum(powers))


def relative_power(error: Tensor, y: Tensor) -> float:
    """‖error‖² / ‖y‖²"""
    return _power(error) / max(_power(y), 1e-30)


def _power(x: Tensor) -> float:
    return float(x.detach().double().square().sum())
