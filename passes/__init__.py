"""The only place that knows order: canonicalization passes, metrics, and targets, best first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mpq_fx.errors import ConfigError
from mpq_fx.facts import Table
from mpq_fx.passes.analyze.sensitivity import measured_singles
from mpq_fx.passes.canonicalize.batch_norm import fold_batch_norm
from mpq_fx.passes.canonicalize.convolution import canonicalize_convolution
from mpq_fx.passes.canonicalize.identity import remove_identities
from mpq_fx.passes.canonicalize.linear import canonicalize_linear
from mpq_fx.passes.lower.onednn import ONEDNN
from mpq_fx.passes.lower.reference import REFERENCE
from mpq_fx.passes.lower.target import Target

CANONICALIZE = (
    remove_identities,
    canonicalize_linear,
    canonicalize_convolution,
    fold_batch_norm,  # after the spellings of what it folds into
)

METRICS: dict[str, Callable[..., Table]] = {
    "auto": measured_singles,
    "measured": measured_singles,
}

TARGETS = (ONEDNN, REFERENCE)  # "auto" takes the first that is available


def target_named(name: str) -> Target:
    """A target by name; "auto" is the first one that is available here."""
    if name == "auto":
        return next(target for target in TARGETS if not target.unavailable())
    for target in TARGETS:
        if target.name == name:
            return target
    raise ConfigError(
        f"unknown target {name!r}", fix=f"one of auto, {', '.join(t.name for t in TARGETS)}"
    )
