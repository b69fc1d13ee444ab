"""A graph that needs gradients goes to Inductor untouched, and the ledger says so."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from mpq_fx.capture import parameters_of
from mpq_fx.compiler import empty_graph
from mpq_fx.config import Config
from mpq_fx.dynamo import frame_root
from mpq_fx.lifecycle import Lifecycle

log = logging.getLogger("mpq_fx")
REASON = "training graph: float"
_WARNED: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


def compile_training(
    gm: GraphModule, example_inputs: Sequence[Any], config: Config
) -> Callable[..., Any]:
    """gm -> Inductor's own forward and backward; gradients equal those of torch.compile.

    On the reference target, which generates no code, the graph runs as it is.
    """
    root = frame_root()
    if root is not None and root not in _WARNED and is_eval(root):
        _WARNED.add(root)
        log.warning(
            "%s is in eval mode but gradients are on, so it runs in float; "
            "to quantize it, call it under `with torch.inference_mode():`",
            type(root).__name__,
        )
    graph = empty_graph(gm, parameters_of(gm, example_inputs))
    return Lifecycle(graph, _differentiable(gm, example_inputs, config), config, reason=REASON)


def _differentiable(
    gm: GraphModule, example_inputs: Sequence[Any], config: Config
) -> Callable[..., Any]:
    if config.target == "reference":
        return gm.forward
    from torch._inductor.compile_fx import compile_fx

    compiled: Callable[..., Any] = compile_fx(gm, list(example_inputs))  # type: ignore[assignment]
    return compiled


def is_eval(root: torch.nn.Module) -> bool:
    return not any(module.training for module in root.modules())
