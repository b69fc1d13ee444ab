"""noise[u, c] = ‖r(u, c)‖²,  pair[u, c; v, d] = 2 ⟨r(u, c), r(v, d)⟩,  r = √p ⊙ (e − ⟨p, e⟩),
p = softmax(y): the inter-layer augmented Hessian of the divergence to the float model.

The Hessian of KL(softmax(y) ‖ softmax(y + e)) at e = 0 is diag(p) − p pᵀ, and ‖r‖² is its quadratic
form of e.  It needs no labels, and its gradient is zero there, so that no first-order term is left
out.  For outputs that are logits along the last dimension; an error that moves all logits alike
costs nothing.  Scaled to noise power.

Reconstruction, as interlayer_hessian is: of arXiv 2306.04879 only the abstract is public.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mpq_fx.facts import Table
from mpq_fx.passes.analyze.calibrate import calibrated
from mpq_fx.passes.analyze.metric import Task
from mpq_fx.passes.analyze.metrics.interlayer_hessian import with_cross_terms
from mpq_fx.passes.analyze.replay import difference, is_logits


def interlayer_kl(task: Task) -> Table:
    """Second-order divergence of singles and pairs, from what singles do to the logits."""
    return calibrated(task, with_cross_terms("interlayer_kl", task, divergence_rows))


def divergence_rows(
    outputs: Sequence[Any], reference: Sequence[Any], excluded: frozenset[int]
) -> Tensor:
    """√(p / positions) ⊙ (e − ⟨p, e⟩) of every output of logits; half its square is the KL."""
    parts = [
        _rows(y.float(), ref.float())
        for k, (y, ref) in enumerate(zip(outputs, reference, strict=True))
        if k not in excluded and is_logits(ref)
    ]
    return torch.cat(parts) if parts else torch.zeros(1)


def _rows(y: Tensor, ref: Tensor) -> Tensor:
    p, error = ref.softmax(-1), difference(y, ref)
    centered = error - (p * error).sum(-1, keepdim=True)
    return (p.sqrt() * centered).reshape(-1) / max(1, ref.numel() // ref.shape[-1]) ** 0.5
