"""noise[u, c] = Σ_t Tr(H_tt) / n_t · ‖Δ_t(c)‖²,  t: the weight and the activation of site u

HAWQ-V2 (arXiv 1911.03852).  H = JᵀJ is the Hessian of the relative error of the outputs at the
float model; its trace by a tensor t is E_z ‖∂(zᵀy)/∂t‖² for random z of unit variance (Hutchinson,
from the side of the outputs), so that one walk back serves every tensor.  The noise is that of an
error without a direction.  Sites without a weight count by their result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from mpq_fx.facts import Choice, Site, Table
from mpq_fx.passes.analyze.linearize import Linearized, linearize, local_errors, probes, pull_back
from mpq_fx.passes.analyze.metric import IsWanted, Record, Single, Task, averaged
from mpq_fx.passes.analyze.replay import Replayer, call
from mpq_fx.passes.analyze.sites import OPERANDS

MOST, TOLERANCE = 32, 0.01  # walks of one call; relative change of the sum of traces that ends them
RESULT = "result"


def hessian_trace(task: Task) -> Table:
    """Mean curvature times squared error, of weight and activation."""

    def each(record: Record, is_wanted: IsWanted) -> Iterator[Single]:
        at = linearize(task.replay, record)
        curvature = mean_curvature(task, at)
        for unit, choice in task.changes(is_wanted):
            errors = local_errors(task.replay, at, unit, choice)
            powers = (
                curved_power(task.replay, at, s, choice, e, curvature) for s, e in errors.items()
            )
            yield Single(unit, choice, sum(powers))

    return averaged("hessian_trace", task, each, forward_passes=1 + 3 * MOST)


def mean_curvature(task: Task, at: Linearized) -> dict[tuple[str, str], float]:
    """{(site, tensor): Tr(H_tt) / n_t}"""
    sums: dict[tuple[str, str], float] = {}
    before, count = 0.0, 1
    for count, z in enumerate(probes(task, at.outputs, MOST), 1):
        for site, g in pull_back(at, z).items():
            for name, (gradient, numel) in operand_gradients(task.replay, at, site, g).items():
                square = float(gradient.double().square().sum()) / max(1, numel)
                sums[site, name] = sums.get((site, name), 0.0) + square
        mean = sum(sums.values()) / count
        if count > 1 and abs(mean - before) < TOLERANCE * abs(before):
            break
        before = mean
    return {key: total / count for key, total in sums.items()}


def operand_gradients(
    replay: Replayer, at: Linearized, site: str, g: Tensor
) -> dict[str, tuple[Tensor, int]]:
    """{tensor: (∂(zᵀy)/∂t, its size)} from the gradient by the result of a site."""
    node, args, kwargs = at.operands[site]
    places = rounded_operands(replay.sites[node.name], str(node.target))
    if not places:
        return {RESULT: (g, g.numel())}
    leaves = {name: args[k].detach().requires_grad_() for name, k in places.items()}
    given = list(args)
    for name, k in places.items():
        given[k] = leaves[name]
    with torch.enable_grad():
        y = call(node, given, kwargs)
    found = torch.autograd.grad(y, [*leaves.values()], g)
    return {name: (f, f.numel()) for name, f in zip(leaves, found, strict=True)}


def rounded_operands(site: Site, target: str) -> dict[str, int]:
    """Positions of what a choice rounds, where that is a weight and one floating activation."""
    if site.op not in ("linear", "conv"):
        return {}
    operands = OPERANDS[target]
    return {"weight": operands.weight, "activation": operands.activation}


def curved_power(
    replay: Replayer,
    at: Linearized,
    name: str,
    choice: Choice,
    error: Tensor,
    curvature: Mapping[tuple[str, str], float],
) -> float:
    """Σ_t curvature_t · ‖Δ_t‖² of one site; `error` is that of its result."""
    node, args, _ = at.operands[name]
    site = replay.sites[node.name]
    places = rounded_operands(site, str(node.target))
    if not places:
        return curvature.get((name, RESULT), 0.0) * float(error.double().square().sum())
    moved = _rounded(replay, site, choice, {n: args[k] for n, k in places.items()})
    return sum(
        curvature.get((name, n), 0.0) * float((moved[n] - args[k]).double().square().sum())
        for n, k in places.items()
    )


def _rounded(
    replay: Replayer, site: Site, choice: Choice, operands: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Weight and activation as a choice stores them."""
    weight = replay.stored_weight(site, choice, operands["weight"])
    x = replay.quantized_activation(site, choice, operands["activation"])
    return {"weight": weight, "activation": x.to(operands["activation"].dtype)}
