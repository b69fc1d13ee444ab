"""{α : C(α) = B},  C(α) = Σ_i Σ_k p_ik c_ik + Σ_(i,j) Σ_kl p_ik p_jl e_kl,  p_i = softmax(α_i)

Logits of options on the manifold of plans whose expected cost is the budget (RCO, arXiv 2605.00649:
one linear equality).  The pair terms e, of conversions between neighbors, are an extension: the
marginal cost of an option is linear in the shares of the others.  A row of fewer options than
others has logits of −inf at its end, which no function here changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

HALVINGS = 60
FAR = 1e6  # of a bias: a softmax of such logits is one option


@dataclass(frozen=True)
class Costs:
    """single[i, k], and for each pair of rows (i, j) a matrix of what two options cost together."""

    single: np.ndarray
    pairs: Sequence[tuple[int, int, np.ndarray]] = ()

    def total(self, shares: np.ndarray) -> float:
        """C: the expected cost of independent rows."""
        both = (float(shares[i] @ at @ shares[j]) for i, j, at in self.pairs)
        return float((shares * self.single).sum()) + sum(both)

    def marginal(self, shares: np.ndarray) -> np.ndarray:
        """∂C/∂p: what an option costs beside the present shares of all others."""
        found = self.single.copy()
        for i, j, at in self.pairs:
            found[i] += at @ shares[j]
            found[j] += shares[i] @ at
        return found


def softmax(logits: np.ndarray) -> np.ndarray:
    """p_ik = exp(α_ik) / Σ_j exp(α_ij)"""
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


def through_softmax(shares: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """∂f/∂p -> ∂f/∂α:  p_ik (g_ik − Σ_j p_ij g_ij)"""
    return shares * (gradient - (shares * gradient).sum(axis=1, keepdims=True))


def normal(shares: np.ndarray, costs: Costs) -> np.ndarray:
    """∂C/∂α, which stands upright on the manifold."""
    return through_softmax(shares, costs.marginal(shares))


def tangent(direction: np.ndarray, upright: np.ndarray) -> np.ndarray:
    """direction − (⟨direction, n⟩ / ⟨n, n⟩) n; without a normal nothing is taken away."""
    length = float((upright * upright).sum())
    if length == 0.0:
        return direction
    return direction - (float((direction * upright).sum()) / length) * upright


def retract(logits: np.ndarray, costs: Costs, budget: float) -> np.ndarray:
    """α + t·d with C = budget;  d_ik = marginal cost / the largest of its row

    For linear costs C grows with t, and d has the direction of the paper's bits: what a unit's
    weights cost in each option, whatever their number.  Where all plans cost less than the budget,
    or all cost more, the nearest end is approached; so with pairs, where this direction, which is
    that of the start, does not lead as far as the budget.
    """
    marginal = costs.marginal(softmax(logits))
    largest = np.abs(marginal).max(axis=1, keepdims=True)
    direction = np.divide(marginal, largest, out=np.zeros_like(marginal), where=largest > 0)

    def excess(t: float) -> float:
        return costs.total(softmax(logits + t * direction)) - budget

    near, far = 0.0, -1.0 if excess(0.0) > 0.0 else 1.0
    while (excess(far) > 0.0) == (far < 0.0) and abs(far) < FAR:
        near, far = far, 2 * far
    low, high = min(near, far), max(near, far)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if excess(middle) > 0.0 else (middle, high)
    return logits + low * direction
