"""model, calls -> what its linear layers read, and the gradients of a loss by their weights

Of an eager model, by hooks; nothing of it is changed, and parameters need no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mpq_fx.config import nearest
from mpq_fx.errors import CalibrationError, ConfigError
from mpq_fx.numerics import check_finite

Call = Sequence[Any]  # the inputs of one call
Loss = Callable[[nn.Module, Call], Tensor]  # (model, call) -> one number
Uses = list[tuple[str, Tensor, Tensor]]  # (layer, what it read, its result)


def linear_layers(model: nn.Module, layers: Sequence[str] = ("*",)) -> dict[str, nn.Linear]:
    """{name: layer} of those whose name fits one of the globs; each glob must fit one."""
    if model.training:
        raise ConfigError("the model is in training mode", fix="model.eval()")
    every = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    if not every:
        raise ConfigError(
            f"{type(model).__name__} has no linear layer", fix="a model with torch.nn.Linear in it"
        )
    for glob in layers:
        if not any(fnmatchcase(name, glob) for name in every):
            raise ConfigError(f"no linear layer is named {glob!r}", fix=nearest(glob, [*every]))
    fits = {name for glob in layers for name in every if fnmatchcase(name, glob)}
    return {name: layer for name, layer in every.items() if name in fits}


def second_moments(
    model: nn.Module, calls: Sequence[Call], layers: Sequence[str] = ("*",)
) -> dict[str, Tensor]:
    """{layer: XᵀX = Σ x xᵀ over positions and calls}, [K, K] in float64"""
    chosen = linear_layers(model, layers)
    sizes = {name: layer.in_features for name, layer in chosen.items()}
    found = {name: torch.zeros(k, k, dtype=torch.float64) for name, k in sizes.items()}

    def add(name: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        rows = _rows(_read(args, kwargs))
        check_finite(rows, "what the layer reads", name, CalibrationError)
        found[name] += rows.T @ rows

    with ExitStack() as hooks, torch.no_grad():
        for name, layer in chosen.items():
            hooks.enter_context(
                layer.register_forward_pre_hook(partial(add, name), with_kwargs=True)
            )
        for call in at_least_one(calls):
            model(*call)
    return found


def weight_gradients(
    model: nn.Module, call: Call, loss: Loss, layers: Sequence[str] = ("*",)
) -> dict[str, Tensor]:
    """{layer: ∂ loss / ∂ W = Σ over positions of (∂ loss / ∂ y) xᵀ}, [N, K] in float64"""
    chosen = linear_layers(model, layers)
    with torch.inference_mode(False), torch.enable_grad():
        value, uses = _observed(model, call, loss, chosen)
        results = [y for _, _, y in uses]
        gradients = torch.autograd.grad(value, results, allow_unused=True) if uses else ()
    if all(g is None for g in gradients):
        raise _independent()
    found = {n: torch.zeros(m.weight.shape, dtype=torch.float64) for n, m in chosen.items()}
    for (name, x, _), g in zip(uses, gradients, strict=True):
        if g is not None:
            check_finite(g, "the gradient of the loss", name, CalibrationError)
            found[name] += _rows(g).T @ _rows(x)
    return found


def _observed(
    model: nn.Module, call: Call, loss: Loss, layers: Mapping[str, nn.Linear]
) -> tuple[Tensor, Uses]:
    """The loss of a call, and every use of a layer on the way to it."""
    uses: Uses = []

    def see(name: str, _: nn.Module, args: Any, kwargs: Any, y: Tensor) -> Tensor:
        y = y if y.requires_grad else y.requires_grad_()  # where parameters are frozen
        uses.append((name, _read(args, kwargs).detach(), y))
        return y.clone()  # what works in place behind the layer works on the copy

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_hook(partial(see, name), with_kwargs=True))
        value = loss(model, tree_map_only(Tensor, _ordinary, tuple(call)))
    return _checked(value), uses


def _checked(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ConfigError(f"the loss of a call is {found}", fix="one number, as a tensor")
    if not value.requires_grad:
        raise _independent()
    check_finite(value, "the loss", "loss(model, call)", CalibrationError)
    return value


def _independent() -> CalibrationError:
    return CalibrationError(
        "the loss does not depend on any of the layers",
        fix="compute it from the outputs of the model, without detach()",
    )


def at_least_one(calls: Sequence[Call]) -> Sequence[Call]:
    """The calls, if there is one."""
    if not calls:
        raise CalibrationError("there is no call to look at", fix="at least one call")
    return calls


def _read(args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> Tensor:
    return args[0] if args else kwargs["input"]


def _rows(x: Tensor) -> Tensor:
    """[..., K] -> [positions, K], in float64"""
    return x.detach().reshape(-1, x.shape[-1]).double().cpu()


def _ordinary(x: Tensor) -> Tensor:
    """Autograd keeps no tensor that was made in inference mode."""
    return x.clone() if x.is_inference() else x
