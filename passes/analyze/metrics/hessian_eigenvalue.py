"""noise[u, c] = Σ_t λ_t · ‖Δ_t(c)‖²,  λ_t = largest eigenvalue of H_tt,  t: weight, activation of u

hessian_eigenvalue  the mean over the calls, λ by v ← H v / ‖H v‖           (HAWQ, arXiv 1905.03696)
eigenvalue_spread   |mean| + deviation: what is unstable is sensitive     (Q-BERT, arXiv 1909.05840)

H = JᵀJ is the Hessian of the relative error of the outputs; H v is a central difference of the
outputs and one walk back.  An upper bound where errors point anywhere: the error of one direction.
Scaled to noise power.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean, pstdev

import torch
from torch import Tensor

from mpq_fx.facts import Table
from mpq_fx.passes.analyze.calibrate import calibrated
from mpq_fx.passes.analyze.linearize import (
    Linearized,
    Reached,
    linearize,
    local_errors,
    pull_back,
    push_forward,
    reached,
    relative_cotangents,
)
from mpq_fx.passes.analyze.metric import IsWanted, Key, Record, Single, Task, averaged
from mpq_fx.passes.analyze.metrics.hessian_trace import (
    RESULT,
    curved_power,
    operand_gradients,
    rounded_operands,
)
from mpq_fx.passes.analyze.replay import call

MOST, TOLERANCE = 100, 1e-3  # steps of one tensor; relative change of λ that ends them
USUAL = 10  # steps, for what a table says of its cost


def hessian_eigenvalue(task: Task) -> Table:
    """Largest curvature times squared error, of weight and activation; the mean over the calls."""
    return calibrated(task, _averaged("hessian_eigenvalue", task)[0])


def eigenvalue_spread(task: Task) -> Table:
    """The same, with its deviation over the calls added to the mean."""
    table, seen = _averaged("eigenvalue_spread", task)
    values = {key: mean_and_deviation(powers) for key, powers in seen.items()}
    return calibrated(task, replace(table, values={**table.values, **values}))


def mean_and_deviation(values: Sequence[float]) -> float:
    """|mean| + √(mean of squared deviations)"""
    return abs(fmean(values)) + pstdev(values)


def _averaged(metric: str, task: Task) -> tuple[Table, Mapping[Key, Sequence[float]]]:
    """The table of means, and what each call gave to each site of a unit that was measured."""
    seen: dict[Key, list[float]] = {}

    def each(record: Record, is_wanted: IsWanted) -> Iterator[Single]:
        at = linearize(task.replay, record)
        yield from _powers(task, at, eigenvalues(task, record, at, is_wanted))

    def keep(given: Sequence[Single]) -> None:
        for unit, choice, power, _ in given:
            for site in unit:
                seen.setdefault((site, choice.name), []).append(power / len(unit))

    passes = 2 + 2.5 * 2 * USUAL * len(task.replay.sites)
    return averaged(metric, task, each, forward_passes=passes, keep=keep), seen


def eigenvalues(
    task: Task, record: Record, at: Linearized, is_wanted: IsWanted
) -> dict[Key, float]:
    """{(site, tensor): λ}"""
    found = {}
    for here in reached(task, record, is_wanted):
        node, args, _ = at.operands[here.site]
        places = rounded_operands(task.replay.sites[node.name], str(node.target))
        given: Mapping[str, Tensor] = {n: args[k] for n, k in places.items()} or {RESULT: here.y}
        for name, tensor in given.items():
            found[here.site, name] = _largest(task, at, here, name, tensor)
    return found


def _largest(task: Task, at: Linearized, here: Reached, name: str, tensor: Tensor) -> float:
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(tensor.shape, generator=generator).to(tensor)
    level = 0.0
    for _ in range(MOST):
        v = v / v.double().norm().to(v.dtype)
        before, v = level, _hessian_product(task, at, here, name, v)
        level = float(v.double().norm())
        if level == 0.0 or abs(level - before) <= TOLERANCE * level:
            break
    return level


def _hessian_product(task: Task, at: Linearized, here: Reached, name: str, v: Tensor) -> Tensor:
    """Jᵀ J v / ‖y‖² for a direction v of one operand of a site, or of its result."""
    moved = push_forward(task.replay, here, _through(task, at, here, name, v))
    back = pull_back(at, relative_cotangents(task, at, moved), [here.site])
    if here.site not in back:
        return torch.zeros_like(v)
    return operand_gradients(task.replay, at, here.site, back[here.site])[name][0]


def _through(task: Task, at: Linearized, here: Reached, name: str, v: Tensor) -> Tensor:
    """What a direction of an operand is at the result; a site is linear in each of its operands."""
    if name == RESULT:
        return v
    node, args, kwargs = at.operands[here.site]
    place = rounded_operands(task.replay.sites[node.name], str(node.target))[name]
    with torch.no_grad():
        up, down = (
            call(node, (*args[:place], args[place] + sign * v, *args[place + 1 :]), kwargs)
            for sign in (0.5, -0.5)
        )
    return up - down


def _powers(task: Task, at: Linearized, curvature: Mapping[Key, float]) -> Iterator[Single]:
    known = {site for site, _ in curvature}
    units = {unit for unit in task.units if known.issuperset(unit)}
    for unit, choice in task.changes(units.__contains__):
        errors = local_errors(task.replay, at, unit, choice)
        powers = (curved_power(task.replay, at, s, choice, e, curvature) for s, e in errors.items())
        yield Single(unit, choice, sum(powers))
