"""model -> a function that computes what the model would, and leaves it as it was

Parameters are passed as detached views, so that no gradient reaches them, and buffers as copies, so
that what forward writes is lost.  Every module is in eval mode meanwhile.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mpq_fx.errors import CalibrationError, ConfigError, first_line
from mpq_fx.registry import root_of

OWN_BATCHES = "batches of your own: mpq_fx.tune(model, batches)"


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[Callable[..., Any]]:
    """Yields run(*args, **kwargs), in eager mode whatever the model was compiled with."""
    model = root_of(model)
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False  # not eval(): what a class does there is no part of a look
        with torch.inference_mode(False), torch.compiler.set_stance("force_eager"):
            values = {name: _readable(p) for name, p in model.named_parameters()}
            values |= {name: b.detach().clone() for name, b in model.named_buffers()}
            yield lambda *args, **kwargs: functional_call(model, values, args, kwargs)
    finally:
        for module, was_training in modes:
            module.training = was_training


@contextmanager
def accepted(model: nn.Module, what: str, shape: Sequence[int]) -> Iterator[None]:
    """A shape that forward cannot take is the caller's mistake, told in forward's own words."""
    try:
        yield
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise CalibrationError(
            f"{type(model).__name__} refuses {what} of shape {tuple(shape)}: {first_line(error)}",
            fix=f"a shape that it takes, or {OWN_BATCHES}",
        ) from error


def _readable(parameter: Tensor) -> Tensor:
    """Autograd cannot keep a tensor that was made in inference mode."""
    return parameter.clone() if parameter.is_inference() else parameter.detach()


def home_of(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where the floating parameters of a model are, and their type."""
    root = root_of(model)
    found = [t for t in (*root.parameters(), *root.buffers()) if t.is_floating_point()]
    if not found:
        return torch.device("cpu"), torch.get_default_dtype()
    if any(t.is_meta for t in found):
        raise ConfigError(
            "the model is on the meta device, without values", fix="load its weights first"
        )
    return found[0].device, found[0].dtype


def parameters_of_forward(model: nn.Module) -> list[inspect.Parameter]:
    """What forward takes by name, in order."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    signature = inspect.signature(root_of(model).forward)
    return [p for p in signature.parameters.values() if p.kind not in kinds]


def is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is inspect.Parameter.empty


def sizes_of(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape that has a batch and something in it: whole numbers above 0."""
    sizes = tuple(shape) if isinstance(shape, Sequence) else (shape,)
    if len(sizes) < 2 or not all(type(n) is int and n > 0 for n in sizes):
        raise ConfigError(
            f"shape={shape} is not the size of a batch and of what is in it",
            fix="shape=(32, 3, 224, 224) for images, shape=(8, 128) for tokens",
        )
    return sizes


def check_positive(**numbers: float | None) -> None:
    """Options that count or scale something are above 0; None is for one left out."""
    for name, number in numbers.items():
        if number is not None and not number > 0:
            raise ConfigError(f"{name}={number} must be above 0", fix=f"{name}=1")
