"""The only place that knows order: canonicalization passes, metrics, and targets, best first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mpq_fx.errors import ConfigError
from mpq_fx.facts import Table
from mpq_fx.passes.analyze.sensitivity import measured_singles
from mpq_fx.passes.lower.reference import REFERENCE
from mpq_fx.passes.lower.onednn import ONEDNN
from mpq_fx.passes.lower.target import Target

CANONICALIZE = ()

METRICS: dict[str, Callable[..., Table]] = {
    "auto": measured_singles,
    "measured": measured_singles,
}

TARGETS = (ONEDNN, REFERENCE)      # "auto" takes the first that is available


def target_named(name: str) -> Target:
    """A target by name; "auto" is the first one that is available here."""
    if name == "auto":
        return next(target for target in TARGETS if not target.unavailable())
    for target in TARGETS:
        if target.name == name:
            return target
    raise ConfigError(f"unknown target {name!r}", fix=f"one of auto, {', '.join(t.name for t in TARGETS)}")
