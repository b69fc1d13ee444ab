"""mpq: the function that torch.compile(model, backend="mpq") finds and calls once per graph."""

from __future__ import annotations

import inspect
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


def compile_apart(model: Any, **options: Any) -> Any:
    """torch.compile(model) for mpq whose graphs are no other's, and do not count against the
    recompile limit of others.

    Dynamo keeps compilations by code, so those of several plans would add up to its limit and
    then run eager.  PyTorch before 2.13 has no such separation; there it holds for the process, not
    for the thread, so that the graphs of one tune would answer another one of the same options in
    a second thread.  Dynamo takes no graph of another backend than the one that is asked for, and
    so this one is of this very call.
    """

    def backend(gm: GraphModule, example_inputs: Sequence[Any], **given: Any) -> Callable[..., Any]:
        return mpq(gm, example_inputs, **given)

    known = inspect.signature(torch.compile).parameters
    apart = {"isolate_recompiles": True} if "isolate_recompiles" in known else {}
    return torch.compile(model, backend=backend, options=options, **apart)  # type: ignore[call-overload]
