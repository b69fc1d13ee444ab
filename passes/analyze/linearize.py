"""y(c) - y ≈ Σ_u J_u e_u(c): a graph at one recorded call, with the way back from its outputs

e_u(c) is what choice c does to the result of site u alone, at the operands of the float model, so
that it covers weights and activations alike; J_u is the derivative of the outputs by that result.
One walk back from the outputs gives J_uᵀz of every site at once, for one z; no parameter needs a
gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node, map_arg
from torch.utils._pytree import tree_map_only

from mpq_fx.facts import Choice
from mpq_fx.passes.analyze.metric import Record, Task, Unit
from mpq_fx.passes.analyze.replay import Replayer, as_real, is_measurable

PROBES = 4  # random directions at the outputs of one call; each holds a gradient of every site
Cotangents = list[Tensor | None]  # one per output; None where an output is no part of the error
Operands = tuple[Node, tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Linearized:
    """Outputs, results of sites and what each site read, at one recorded call."""

    outputs: list[Any]
    results: Mapping[str, Tensor]  # site -> y_u, in the graph of autograd
    operands: Mapping[str, Operands]
    samples: int  # a first dimension that all of them share: calls within the call; or 1


def linearize(replay: Replayer, record: Record) -> Linearized:
    """Run the float graph once and keep the way back to the result of every site."""
    results: dict[str, Tensor] = {}
    operands: dict[str, Operands] = {}
    env = {node: _ordinary(value) for node, value in replay.start(record).items()}
    with torch.enable_grad():
        for node in replay.gm.graph.nodes:
            if node.op == "output":
                outputs = list(map_arg(node.args[0], env.__getitem__))
                return Linearized(
                    outputs, results, operands, _samples([*outputs, *results.values()])
                )
            site = replay.sites.get(node.name)
            if site is not None:
                args, kwargs = map_arg((node.args, dict(node.kwargs)), env.__getitem__)
                operands[site.name] = node, _detached(args), _detached(kwargs)
            replay.step(env, node, {})
            y = env.get(node)  # dropped already where nobody reads it
            if site is not None and isinstance(y, Tensor) and y.is_floating_point():
                results[site.name] = y if y.requires_grad else y.requires_grad_()
    raise AssertionError("a graph without an output node")


def pull_back(at: Linearized, cotangents: Cotangents) -> dict[str, Tensor]:
    """{site: J_uᵀz}; sites that no output depends on are left out."""
    pairs = [
        (y, z)
        for y, z in zip(at.outputs, cotangents, strict=True)
        if z is not None and isinstance(y, Tensor) and y.requires_grad
    ]
    if not pairs or not at.results:
        return {}
    outputs, given = zip(*pairs, strict=True)
    found = torch.autograd.grad(
        outputs, [*at.results.values()], given, retain_graph=True, allow_unused=True
    )
    return {s: g.detach() for s, g in zip(at.results, found, strict=True) if g is not None}


def probes(task: Task, outputs: Sequence[Any], count: int = PROBES) -> Iterator[Cotangents]:
    """z = ±1 / ‖y‖, so that E (zᵀ J e)² = ‖J e‖² / ‖y‖²: the noise power of e.

    The same in every process.
    """
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield [
            _probe(y, generator) if k not in task.excluded and is_measurable(y) else None
            for k, y in enumerate(outputs)
        ]


def local_errors(replay: Replayer, at: Linearized, unit: Unit, choice: Choice) -> dict[str, Tensor]:
    """{site: e_u(c)}: what a choice does to the results of a unit, each on float operands."""
    found = {}
    with torch.no_grad():
        for name in unit:
            if name in at.results:
                node, args, kwargs = at.operands[name]
                y = replay.compute(replay.sites[node.name], choice, node, args, kwargs)
                found[name] = y - at.results[name]
    replay.forget(unit)
    return found


def dots(at: Linearized, gradients: Mapping[str, Tensor], errors: Mapping[str, Tensor]) -> Tensor:
    """[samples]: Σ_sites ⟨J_uᵀz, e_u⟩ = ⟨z, J e⟩ of each sample, in float64"""
    total = torch.zeros(at.samples, dtype=torch.float64)
    for site, error in errors.items():
        if site in gradients:
            total += (gradients[site].double() * error.double()).reshape(at.samples, -1).sum(1)
    return total


def _samples(tensors: Sequence[Any]) -> int:
    sizes = {x.shape[0] if x.dim() else 1 for x in tensors if isinstance(x, Tensor)}
    return sizes.pop() if len(sizes) == 1 else 1


def _probe(y: Tensor, generator: torch.Generator) -> Tensor | None:
    norm = as_real(y).detach().double().norm().item()
    if norm == 0.0 or y.is_complex():
        return None
    return torch.randint(2, y.shape, generator=generator).mul_(2).sub_(1).to(y) / norm


def _ordinary(value: Any) -> Any:
    """Autograd keeps no tensor that was made in inference mode."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def _detached(values: Any) -> Any:
    return tree_map_only(Tensor, Tensor.detach, values)
