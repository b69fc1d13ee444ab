"""A graph that needs gradients goes to Inductor untouched, and the ledger says so."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from mpq_fx.dynamo import frame_root

log = logging.getLogger("mpq_fx")
REASON = "training graph: float"
_WARNED: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


def compile_training(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """gm -> Inductor's own forward and backward; gradients equal those of torch.compile."""
    from torch._inductor.compile_fx import compile_fx

    root = frame_root()
    if root is not None and root not in _WARNED and is_eval(root):
        _WARNED.add(root)
        log.warning(
            "%s is in eval mode but gradients are on, so it runs in float; "
            "to quantize it, call it under `with torch.inference_mode():`",
            type(root).__name__,
        )
    return compile_fx(gm, list(example_inputs))


def is_eval(root: torch.nn.Module) -> bool:
    return not any(module.training for module in root.modules())
