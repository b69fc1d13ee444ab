"""score[u, c] = (E_z E_δ |⟨∂(zᵀy)/∂x_u, δ⟩|)² · ‖e_u(c)‖² / ‖y_u‖²,  δ ~ N(0, mean x_u²)

Taylor sensitivity (CPTQuant's TDMPQ, arXiv 2412.03599): the first-order change of the outputs,
along random directions z, when the input x_u of a layer is disturbed; the mean over δ is exactly
√(2/π) · ‖∂(zᵀy)/∂x_u‖ · RMS(x_u), so that nothing is sampled but z.  Sites other than linear layers
and convolutions count by their result.  One walk back for each z serves all sites and choices.
Scaled to noise power.

Reconstruction: public is that a Taylor decomposition tells a layer's sensitivity to a disturbed
input; directions in place of a loss, the size of δ and the relative error of the choice are ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from mpq_fx.facts import Table
from mpq_fx.passes.analyze.calibrate import calibrated
from mpq_fx.passes.analyze.linearize import PROBES, Linearized, linearize, probes, pull_back
from mpq_fx.passes.analyze.metric import IsWanted, Record, Single, Task, averaged
from mpq_fx.passes.analyze.metrics.hessian_trace import operand_gradients
from mpq_fx.passes.analyze.metrics.local_error import weighed
from mpq_fx.passes.analyze.sites import OPERANDS


def taylor(task: Task) -> Table:
    """Squared first-order change by a disturbed input, times the relative error of the choice."""

    def each(record: Record, is_wanted: IsWanted) -> Iterator[Single]:
        at = linearize(task.replay, record)
        squares = {site: change**2 for site, change in changes(task, at).items()}
        yield from weighed(task, at, squares, is_wanted)

    passes = 1 + 4 * PROBES + task.count / max(1, len(task.units))
    return calibrated(task, averaged("taylor", task, each, forward_passes=passes))


def changes(task: Task, at: Linearized) -> dict[str, float]:
    """{site: E_z E_δ |⟨∂(zᵀy)/∂x, δ⟩|}, of the sites that an output depends on"""
    sums: dict[str, float] = {}
    for z in probes(task, at.outputs):
        for site, g in pull_back(at, z).items():
            gradient, x = _at_input(task, at, site, g)
            power = float(x.double().square().mean())
            change = math.sqrt(2 / math.pi * power) * float(gradient.double().norm())
            sums[site] = sums.get(site, 0.0) + change
    return {site: total / PROBES for site, total in sums.items()}


def _at_input(task: Task, at: Linearized, site: str, g: Tensor) -> tuple[Tensor, Tensor]:
    """(∂(zᵀy)/∂x, x): x is the activation that a site reads, or else its result."""
    node, args, _ = at.operands[site]
    found = operand_gradients(task.replay, at, site, g)
    if "activation" in found:
        return found["activation"][0], args[OPERANDS[str(node.target)].activation]
    return g, at.results[site].detach()
