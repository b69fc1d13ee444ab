"""What Dynamo knows besides the graph: the frame it compiles, breaks, skipped frames, recompilations."""

from __future__ import annotations

import inspect
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
    breaks = dict(counters["graph_break"])
    limits = {reason: n for reason, n in breaks.items() if "recompile" in reason.lower()}
    return {
        "graph_breaks": {reason: n for reason, n in breaks.items() if reason not in limits},
        "frames": dict(counters["frames"]),
        "recompile_limit": sum(limits.values()) + counters["frames"].get("recompile_limit", 0),
        "unimplemented": dict(counters["unimplemented"]),
    }
