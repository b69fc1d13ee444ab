"""mpq-fx: torch.compile(model, backend="mpq") chooses the numeric precision of every layer."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpq_fx import synthetic
    from mpq_fx.api import apply, explain, finalize, pareto, refresh, tune
    from mpq_fx.config import Config
    from mpq_fx.errors import MpqError
    from mpq_fx.facts import Plan
    from mpq_fx.front import Front

__version__ = "0.1.0"
__all__ = [
    "Config",
    "Front",
    "MpqError",
    "Plan",
    "apply",
    "explain",
    "finalize",
    "pareto",
    "refresh",
    "synthetic",
    "tune",
]

# Loaded on first use: `import mpq_fx` must not import torch, and kernels import mpq_fx.formats.
_HOMES = {
    "Config": "config",
    "Front": "front",
    "MpqError": "errors",
    "Plan": "facts",
    **dict.fromkeys(("apply", "explain", "finalize", "pareto", "refresh", "tune"), "api"),
}


def __getattr__(name: str) -> Any:
    if name == "synthetic":
        return import_module("mpq_fx.synthetic")
    if name not in _HOMES:
        raise AttributeError(f"module 'mpq_fx' has no attribute {name!r}")
    return getattr(import_module(f"mpq_fx.{_HOMES[name]}"), name)
