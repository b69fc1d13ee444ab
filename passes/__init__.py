"""The only place that knows order: canonicalization passes, metrics, and targets, best first.

What plug-ins add is looked up when it is needed (mpq_fx.plugins), never when this is imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mpq_fx.config import nearest
from mpq_fx.errors import ConfigError
from mpq_fx.graph import Pass
from mpq_fx.passes.analyze.metric import Metric
from mpq_fx.passes.analyze.metrics.auto import auto
from mpq_fx.passes.analyze.metrics.canonical_correlation import canonical_correlation
from mpq_fx.passes.analyze.metrics.fisher import first_order, fisher, fisher_elementwise
from mpq_fx.passes.analyze.metrics.heavy_tail import heavy_tail
from mpq_fx.passes.analyze.metrics.hessian_eigenvalue import eigenvalue_spread, hessian_eigenvalue
from mpq_fx.passes.analyze.metrics.hessian_trace import hessian_trace
from mpq_fx.passes.analyze.metrics.interlayer_hessian import interlayer_hessian
from mpq_fx.passes.analyze.metrics.interlayer_kl import interlayer_kl
from mpq_fx.passes.analyze.metrics.interlayer_loss import interlayer_loss
from mpq_fx.passes.analyze.metrics.kl_singles import kl_singles
from mpq_fx.passes.analyze.metrics.local_error import local_error
from mpq_fx.passes.analyze.metrics.masked import masked
from mpq_fx.passes.analyze.metrics.measured_pairs import (
    block_pairs,
    measured_pairs,
    projected_pairs,
)
from mpq_fx.passes.analyze.metrics.measured_singles import measured_singles
from mpq_fx.passes.analyze.metrics.perturbation_hessian import perturbation_hessian
from mpq_fx.passes.analyze.metrics.pruning import pruning
from mpq_fx.passes.analyze.metrics.relevance import relevance
from mpq_fx.passes.analyze.metrics.taylor import taylor
from mpq_fx.passes.canonicalize.batch_norm import fold_batch_norm, spell_batch_norm
from mpq_fx.passes.canonicalize.casts import spell_casts
from mpq_fx.passes.canonicalize.convolution import spell_convolutions
from mpq_fx.passes.canonicalize.dropout import remove_dropout
from mpq_fx.passes.canonicalize.einsum import spell_einsum
from mpq_fx.passes.canonicalize.identities import remove_identities
from mpq_fx.passes.canonicalize.linear import spell_linear
from mpq_fx.passes.canonicalize.linear_bias import merge_linear_bias, split_computed_bias
from mpq_fx.passes.canonicalize.linear_left import spell_left_linear
from mpq_fx.passes.lower.kernel import with_kernels
from mpq_fx.passes.lower.onednn import ONEDNN
from mpq_fx.passes.lower.reference import REFERENCE
from mpq_fx.passes.lower.target import Target, placed
from mpq_fx.passes.lower.triton import TRITON
from mpq_fx.plugins import Catalog, load

CANONICALIZE: tuple[Pass, ...] = (
    remove_dropout,
    spell_casts,
    remove_identities,  # after spell_casts, which shows casts to the same dtype
    spell_convolutions,
    spell_batch_norm,
    spell_linear,
    spell_left_linear,
    spell_einsum,
    split_computed_bias,  # after every spelling of linear and convolution
    merge_linear_bias,  # likewise
    fold_batch_norm,  # last: it needs one spelling of what it folds, and of what it folds into
)

METRICS: Catalog[Metric] = Catalog(
    "metrics",
    {
        "auto": auto,
        "measured": measured_singles,
        "interlayer_hessian": interlayer_hessian,
        "interlayer_kl": interlayer_kl,
        "interlayer_loss": interlayer_loss,
        "measured_pairs": measured_pairs,
        "block_pairs": block_pairs,
        "projected_pairs": projected_pairs,
        "fisher": fisher,
        "fisher_elementwise": fisher_elementwise,
        "first_order": first_order,
        "hessian_trace": hessian_trace,
        "hessian_eigenvalue": hessian_eigenvalue,
        "eigenvalue_spread": eigenvalue_spread,
        "perturbation_hessian": perturbation_hessian,
        "relevance": relevance,
        "canonical_correlation": canonical_correlation,
        "pruning": pruning,
        "taylor": taylor,
        "heavy_tail": heavy_tail,
        "kl": kl_singles,
        "masked": masked,
        "local_error": local_error,
    },
)

TARGETS = (ONEDNN, TRITON, REFERENCE)  # "auto" takes the first that can run the model here


def target_named(name: str, device: str | None = None, tensors: str = "cpu") -> Target:
    """A target by name, on a device; "auto" is the first one that is available here, and computes
    on tensors of this kind of device.
    """
    if name == "auto":
        able = (target for target in TARGETS if tensors in target.tensors)
        found = next(target for target in able if not target.unavailable())
    elif name in targets():
        found = targets()[name]
    else:
        raise ConfigError(f"unknown target {name!r}", fix=f"one of auto, {', '.join(targets())}")
    return with_kernels(placed(found, device), load("kernels"))


def targets() -> Mapping[str, Target]:
    """TARGETS by name, then those of plug-ins, which "auto" never takes: they are asked for."""
    return Catalog("targets", {target.name: target for target in TARGETS})


def canonicalization() -> tuple[Pass, ...]:
    """CANONICALIZE with the passes of plug-ins, each of which says where it goes."""
    passes = CANONICALIZE
    for place in load("passes").values():
        passes = tuple(place(passes))
    return passes


def after(passes: Sequence[Pass], name: str, mine: Pass) -> tuple[Pass, ...]:
    """(…, name, …)  ->  (…, name, mine, …)"""
    names = [getattr(each, "__name__", type(each).__name__) for each in passes]
    if name not in names:
        raise ConfigError(f"there is no pass {name!r} to go after", fix=nearest(name, names))
    at = names.index(name) + 1
    return (*passes[:at], mine, *passes[at:])
