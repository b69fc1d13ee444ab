"""Scores from the gradient of a random direction z at the outputs, g_u = J_uᵀz, and from e_u(c):

fisher              E_z ⟨g_u, e_u⟩²,  and for pairs 2 E_z ⟨g_u, e_u⟩ ⟨g_v, e_v⟩
fisher_elementwise  E_z Σ g_u² e_u²     (without the cross terms within a layer)
first_order         E_z |⟨g_u, e_u⟩|    (no Hessian)

J_u and e_u are those of `linearize`.  z has unit variance and is divided by the norm of the output,
so that E g gᵀ = Jᵀ J, the Fisher matrix, is the Hessian of the relative error at the float model:
`fisher` estimates the same singles and pairs as `interlayer_hessian`.  A walk back costs about two
forward passes and serves all units and choices; the standard error of a single is √(2 / (walks ·
samples)) of it.  ⟨g, e⟩ is ⟨∂/∂W, ΔW⟩ where only a weight changes: no gradient of one is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from mpq_fx.facts import Choice, Table
from mpq_fx.passes.analyze.calibrate import calibrated
from mpq_fx.passes.analyze.linearize import (
    PROBES,
    Linearized,
    dots,
    linearize,
    local_errors,
    probes,
    pull_back,
)
from mpq_fx.passes.analyze.metric import IsWanted, Key, Record, Single, Task, Unit, averaged
from mpq_fx.passes.analyze.metrics.interlayer_hessian import gram_of, pairs_of, rows_of

Tensors = Mapping[str, Tensor]
T = TypeVar("T")


def fisher(task: Task) -> Table:
    """Squares and products of ⟨g, e⟩; samples of one call count as calls (Fisher, empirical)."""
    rows: dict[Key, list[Tensor]] = {}

    def each(record: Record, is_wanted: IsWanted) -> Iterator[Single]:
        for unit, choice, given in _each(task, record, is_wanted, dots):
            row = torch.cat(given) / len(given) ** 0.5
            yield Single(unit, choice, float(row.square().sum()), row)

    def keep(given: Sequence[Single]) -> None:
        for key, row in rows_of(given).items():
            rows.setdefault(key, []).append(row)

    table = averaged("fisher", task, each, forward_passes=_passes(task), keep=keep)
    used = max(1, table.provenance["records"])
    stacked = [torch.cat(seen) / used**0.5 for seen in rows.values()]
    numbers = stacked[0].numel() if stacked else 0
    return replace(table, pairs=pairs_of(gram_of(stacked), [*rows], numbers))


def first_order(task: Task) -> Table:
    """|⟨g, e⟩|, the mean over directions and samples, scaled to errors of the outputs."""

    def each(record: Record, is_wanted: IsWanted) -> Iterator[Single]:
        for unit, choice, given in _each(task, record, is_wanted, dots):
            yield Single(unit, choice, float(torch.cat(given).abs().mean()))

    return calibrated(task, averaged("first_order", task, each, forward_passes=_passes(task)))


def fisher_elementwise(task: Task) -> Table:
    """Σ g² e² over the elements of a result, scaled to errors of the outputs."""

    def each(record: Record, is_wanted: IsWanted) -> Iterator[Single]:
        for unit, choice, given in _each(task, record, is_wanted, _squares):
            yield Single(unit, choice, sum(given) / len(given))

    table = averaged("fisher_elementwise", task, each, forward_passes=_passes(task))
    return calibrated(task, table)


def _each(
    task: Task,
    record: Record,
    is_wanted: IsWanted,
    of: Callable[[Linearized, Tensors, Tensors], T],
) -> Iterator[tuple[Unit, Choice, list[T]]]:
    """For every single, `of` the gradients of each direction and of what the choice changes."""
    at = linearize(task.replay, record)
    gradients = [pull_back(at, z) for z in probes(task, at.outputs)]
    for unit, choice in task.changes(is_wanted):
        errors = local_errors(task.replay, at, unit, choice)
        yield unit, choice, [of(at, g, errors) for g in gradients]


def _squares(at: Linearized, gradients: Tensors, errors: Tensors) -> float:
    both = [(gradients[s], e) for s, e in errors.items() if s in gradients]
    return float(sum((g.double() * e.double()).square().sum() for g, e in both))


def _passes(task: Task) -> float:
    """One forward pass, two for each walk back, and each local error."""
    return 1 + 2 * PROBES + task.count / max(1, len(task.units))
