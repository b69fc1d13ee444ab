"""What Dynamo knows besides the graph: the frame it compiles, breaks, skipped frames,
recompilations.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch._dynamo.output_graph import OutputGraph
from torch._dynamo.utils import counters


def frame_root() -> torch.nn.Module | None:
    """The module whose method Dynamo is compiling right now: `self` of the user's frame.

    Only valid inside a backend call; found through the compiler that called it.
    """
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, OutputGraph):
            root = owner.local_scope.get("self", owner.local_scope.get("fn"))
            return root if isinstance(root, torch.nn.Module) else None
        frame = frame.f_back
    return None


def dynamo_facts() -> dict[str, Any]:
    """Graph breaks by reason, frames that Dynamo gave up on, and hits of its recompile limit."""
    breaks, hits = _apart(counters["graph_break"])
    unsupported, more = _apart(counters["unimplemented"])
    return {
        "graph_breaks": breaks,
        "frames": dict(counters["frames"]),
        "recompile_limit": hits + more,
        "unimplemented": unsupported,
    }


def _apart(counted: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Reasons without those that speak of the recompile limit, and how often those were given."""
    others = {reason: n for reason, n in counted.items() if "recompile limit" not in reason.lower()}
    return others, sum(counted.values()) - sum(others.values())


def compile_apart(model: Any, **options: Any) -> Any:
    """torch.compile(model) for mpq whose graphs do not count against the recompile limit of others.

    Dynamo keeps compilations by code, so those of several plans would add up to its limit and
    then run eager.  PyTorch before 2.13 has no such separation.
    """
    known = inspect.signature(torch.compile).parameters
    apart = {"isolate_recompiles": True} if "isolate_recompiles" in known else {}
    return torch.compile(model, backend="mpq", options=options, **apart)  # type: ignore[call-overload]
