"""weights of a model <-> codes in a plan: a plan that fills a model on the meta device

    state|NAME|value                     a tensor as it is (norms, biases, buffers, bfloat16
    weights)
    state|NAME|codes, …|scale, …|zero    a weight in the scaled format of its choice
Quantizing a dequantized weight gives the same codes, so a model filled this way runs the same plan.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from mpq_fx.errors import PlanError
from mpq_fx.facts import Plan
from mpq_fx.formats import format_named
from mpq_fx.numerics import Quantized, dequantize_weight, quantize_weight

ROWS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)  # a row of the weight, an output


def attach(plan: Plan, model: nn.Module) -> Plan:
    """The plan with everything the model holds, site weights as codes of their chosen format."""
    found: dict[str, Tensor] = {}
    for name, tensor in state(model):
        fmt = weight_format(plan, name)
        if fmt is None or not quantizes_rows(model, plan, name):
            found[f"state|{name}|value"] = tensor.detach().clone()
        elif format_named(fmt).is_plain:
            found[f"state|{name}|value"] = tensor.detach().to(getattr(torch, fmt))
        else:
            q = quantize_weight(tensor.detach(), format_named(fmt))
            parts = {"codes": q.codes, "scale": q.scale, "zero": q.zero}
            found |= {f"state|{name}|{part}": value for part, value in parts.items()}
    return replace(plan, tensors={**plan.tensors, **found})


def materialize(model: nn.Module, plan: Plan) -> None:
    """Fill a model on the meta device from the codes of a plan, in place; what was tied stays so.

    Raises PlanError, before anything is changed, if the plan lacks a tensor of the model.
    """
    held = [*state(model)]
    with torch.no_grad():
        made = {id(tensor): filled(tensor, restored(plan, name, tensor)) for name, tensor in held}
    for module in model.modules():
        for owned in (module._parameters, module._buffers):
            for key, tensor in owned.items():
                if tensor is not None:
                    owned[key] = made[id(tensor)]  # type: ignore[assignment]


def filled(like: Tensor, value: Tensor) -> Tensor:
    """A parameter or a buffer as `like`, in main memory."""
    found = torch.empty_like(like, device="cpu").copy_(value)
    if isinstance(like, nn.Parameter):
        return nn.Parameter(found, requires_grad=like.requires_grad)
    return found


def restored(plan: Plan, name: str, like: Tensor) -> Tensor:
    """One tensor of the model from the plan, dequantized where the plan holds codes."""
    tensors, key = plan.tensors, f"state|{name}|"
    if key + "value" in tensors:
        value = tensors[key + "value"]
    elif key + "codes" in tensors:
        fmt = weight_format(plan, name)
        assert fmt is not None, f"codes of {name} without a choice"
        parts = (tensors[key + part] for part in ("codes", "scale", "zero"))
        value = dequantize_weight(Quantized(*parts), format_named(fmt))
    else:
        raise PlanError(
            f"the plan holds no values of {name}, which is on the meta device",
            fix="plan.with_codes(model).save(path), where the weights are",
        )
    if value.shape != like.shape:
        raise PlanError(
            f"{name}: the plan holds {tuple(value.shape)}, the model {tuple(like.shape)}",
            fix="the plan of this very model",
        )
    return value.to(like.dtype)


def weight_format(plan: Plan, name: str) -> str | None:
    """The format that the plan chose for a weight; None for a tensor of no site, or kept float, or
    read by several sites in different formats.
    """
    if not name.endswith("weight"):
        return None
    site, facts = name.removesuffix(".weight"), plan.fingerprint["sites"]
    readers = [s for s in facts if s.partition("#")[0] == site and s in plan.choices]
    found = {(plan.choices[reader].weight, facts[reader]["dtype"]) for reader in readers}
    if len(found) != 1:
        return None
    ((chosen, own),) = found
    return None if chosen == own else chosen


def quantizes_rows(model: nn.Module, plan: Plan, name: str) -> bool:
    """Is a parameter the weight that its site reads, row by row?  A transpose of one, as GPT-2 has
    it, is scaled along its other dimension.
    """
    path = name.rpartition(".")[0]
    shape = plan.fingerprint["sites"].get(path, {}).get("weight_shape")
    is_known = isinstance(model.get_submodule(path), ROWS)
    return is_known and shape == list(model.get_parameter(name).shape)


def state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name, the non-persistent buffers too."""
    yield from model.named_parameters()
    yield from model.named_buffers()
