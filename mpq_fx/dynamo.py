"""What Dynamo knows besides the graph: the frame it compiles, breaks, skipped frames,
recompilations; and how a backend's errors pass through it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from torch._dynamo import config, convert_frame
from torch._dynamo.exc import ShortenTraceback
from torch._dynamo.output_graph import OutputGraph
from torch._dynamo.utils import counters

from mpq_fx.errors import MpqError


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


def one_compiles() -> AbstractContextManager[Any]:
    """While entered, no other thread compiles: Inductor keeps what it is at in the process.

    Dynamo holds this lock while it calls a backend; a plan is compiled later, in a call.
    """
    return convert_frame.compile_lock


def many_variants(count: int) -> AbstractContextManager[Any]:
    """While entered, one model may be compiled `count` times more than Dynamo's limit allows."""
    return config.patch(recompile_limit=config.recompile_limit + count)


def passed_on(error: MpqError) -> MpqError:
    """The same error, of a type of Dynamo's too: raised in a backend it reaches the user as it is.

    Any other would be the cause of a BackendCompilerFailed, which `except MpqError` does not catch.
    The traceback begins where the caller of this function, the backend, was called.
    """
    caller = inspect.currentframe()
    passing = _passing(type(error))(error.what, at=error.at, fix=error.fix)
    passing.first_useful_frame = caller.f_back if caller else None  # type: ignore[attr-defined]
    return passing


class _Passing(ShortenTraceback):
    def __init__(self, message: str) -> None:
        super().__init__(message, first_useful_frame=None)


@cache
def _passing(kind: type[MpqError]) -> type[MpqError]:
    def reduce(self: MpqError) -> Any:
        return kind(self.what, at=self.at, fix=self.fix).__reduce__()

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind, _Passing), {**names, "__reduce__": reduce})
