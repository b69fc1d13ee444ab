"""batch -> a call of a model, or of what its forward takes of the batch"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mpq_fx.errors import ConfigError


def call(model: Callable[..., Any], batch: Any) -> Any:
    """Tensor → model(x), tuple or list → model(*x), dict → model(**x)."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return model(*batch)
    raise ConfigError(
        f"a batch is a Tensor, a tuple or a dict, not {type(batch).__name__}",
        fix="mpq_fx.tune(model, [(x,), ...])",
    )


def inputs_of(model: torch.nn.Module, batch: Any) -> Any:
    """The part of a batch that the forward takes; the rest, such as labels, is for the loss.

    Of a dict the names that it has, of a tuple or a list as many from the front as it can take.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    kinds = {p.kind for p in parameters}
    if isinstance(batch, Mapping) and inspect.Parameter.VAR_KEYWORD not in kinds:
        names = {p.name for p in parameters}
        return {name: value for name, value in batch.items() if name in names}
    if isinstance(batch, (tuple, list)) and inspect.Parameter.VAR_POSITIONAL not in kinds:
        places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return batch[: sum(p.kind in places for p in parameters)]
    return batch
