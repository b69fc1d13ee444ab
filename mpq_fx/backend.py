"""mpq: the function that torch.compile(model, backend="mpq") finds and calls once per graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from mpq_fx.compiler import compile_graph
from mpq_fx.config import Config
from mpq_fx.dynamo import passed_on
from mpq_fx.errors import ConfigError, MpqError
from mpq_fx.install import refuse_freed
from mpq_fx.training import compile_training


def mpq(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Dynamo's graph -> a callable that observes, then runs in mixed precision.

    `options` are the fields of `mpq_fx.Config`.  A graph that needs gradients goes to Inductor
    untouched.  Raises ConfigError for an unknown option, and for any `mode`, which is Inductor's.
    """
    try:
        return _compile(gm, example_inputs, options, mode)
    except MpqError as error:
        raise passed_on(error) from error.__cause__


def _compile(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    options: Mapping[str, Any] | None,
    mode: str | None,
) -> Callable[..., Any]:
    if mode not in (None, "default"):
        raise ConfigError(f"mode={mode!r} is an option of Inductor", fix="leave mode out")
    config = Config.from_options(options)
    refuse_freed(example_inputs)
    if needs_gradients(example_inputs):
        return compile_training(gm, example_inputs, config)
    return compile_graph(gm, example_inputs, config)


def needs_gradients(example_inputs: Sequence[Any]) -> bool:
    """Can a gradient flow?  Grad mode is on and some input asks for one."""
    return torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in example_inputs
    )
