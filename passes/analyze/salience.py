"""salience[r, j] of each weight of a linear layer, [N, K], and its sums over groups or features

SliM-LLM  W² / U²                 what deleting a weight costs once later columns have adapted
SpQR      E(G) − E(G without j)   what keeping one weight as it is saves in its group
GWQ       |∂L/∂W|                 from one sample; the largest are kept
MixLLM    |t + t² / 2|            of a feature, t = ⟨∂L/∂w_o, Δ_o⟩ for one sample

U is the diagonal of the upper Cholesky factor of H⁻¹, H = 2 XᵀX + damping (GPTQ).  An analysis: no
plan or kernel of mpq-fx mixes formats within a weight, see `groups`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mpq_fx.errors import CalibrationError, ConfigError
from mpq_fx.formats import Format
from mpq_fx.numerics import blocked, fake_quantize

DAMPING = 0.01  # of the mean diagonal of H, as GPTQ adds


def inverse_factor(moment: Tensor, damping: float = DAMPING) -> Tensor:
    """[K]: diag U with UᵀU = H⁻¹, H = 2 XᵀX + damping · mean diag · 1; `moment` is XᵀX, [K, K]

    Rounding column j by e costs ½ e² / U_j² once all later columns have adapted.
    """
    hessian = 2.0 * moment.double()
    mean = float(hessian.diagonal().mean())
    if not mean > 0.0:
        raise CalibrationError(
            f"the mean square of what the layer reads is {mean / 2}",
            fix="calls in which the layer reads something else than zeros",
        )
    hessian.diagonal().add_(damping * mean)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse).diagonal()


def hessian_salience(w: Tensor, factor: Tensor) -> Tensor:
    """W² / U² (SliM-LLM, arXiv 2405.14917); its groups are 128 columns"""
    return (w.double() / factor).square()


def leave_one_out(w: Tensor, factor: Tensor, fmt: Format) -> Tensor:
    """E(G) − E(G without j), fitted without j; E = Σ (w − q(w))² / U² (SpQR, arXiv 2306.03078)

    A range includes 0, so that a weight set to zero is one that the fit does not see.
    """
    _check_blocks(fmt)
    w = w.double()
    whole = _errors(w, factor, fmt)
    gains = torch.empty_like(w)
    for j in range(min(fmt.block, w.shape[1])):
        without = w.clone()
        without[:, j :: fmt.block] = 0.0
        gain = whole - _errors(without, factor, fmt)
        gains[:, j :: fmt.block] = gain[:, : gains[:, j :: fmt.block].shape[1]]
    return gains


def outlier_threshold(w: Tensor, factor: Tensor, tau: float = 0.2) -> float:
    """τ · mean over columns of Var(W[:, j]) / U_j²: SpQR keeps what gains more"""
    return tau * float((w.double().var(0, correction=0) / factor.square()).mean())


def largest(scores: Tensor, share: float) -> Tensor:
    """Which ⌈share · n⌉ scores are the largest, as booleans; of equal ones the first (GWQ)"""
    if not 0.0 <= share <= 1.0:
        raise ConfigError(f"a share of {share} of the weights", fix="a share from 0 to 1")
    count = math.ceil(round(share * scores.numel(), 6))
    order = scores.reshape(-1).argsort(descending=True, stable=True)
    kept = torch.zeros(scores.numel(), dtype=torch.bool)
    kept[order[:count].cpu()] = True
    return kept.view(scores.shape).to(scores.device)


def fisher_change(t: Tensor) -> Tensor:
    """|t + t² / 2|: the change of a loss by ΔW, with (gᵀΔ)² for ΔᵀHΔ (MixLLM, arXiv 2412.14590)"""
    return (t + 0.5 * t.square()).abs()


def per_group(values: Tensor, group: int) -> Tensor:
    """[N, K] -> [⌈K / group⌉]: sums over all rows and over `group` neighboring columns"""
    columns = values.double().sum(0)
    missing = -len(columns) % group
    return torch.nn.functional.pad(columns, (0, missing)).view(-1, group).sum(1)


def per_feature(values: Tensor) -> Tensor:
    """[N, K] -> [N]: sums over the columns"""
    return values.double().sum(1)


def dense_sparse(w: Tensor, kept: Tensor, fmt: Format) -> Tensor:
    """w where `kept`, else the value of `fmt`, fitted to what is left (SpQR, GWQ)"""
    rest = fake_quantize(w.masked_fill(kept, 0.0), fmt)
    return torch.where(kept, w, rest)


def _errors(w: Tensor, factor: Tensor, fmt: Format) -> Tensor:
    """[N, groups]: Σ (w − q(w))² / U² of each group"""
    return blocked(((w - fake_quantize(w, fmt)) / factor).square(), fmt).sum(-1)


def _check_blocks(fmt: Format) -> None:
    if fmt.block <= 0:
        raise ConfigError(f"{fmt.name} has no groups", fix="a format with block > 0")
