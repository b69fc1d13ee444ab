"""y(c) - y ≈ Σ_u J_u e_u(c): a graph at one recorded call, with the way back from its outputs

e_u(c) is what choice c does to the result of site u alone, at the operands of the float model, so
that it covers weights and activations alike; J_u is the derivative of the outputs by that result.
One walk back from the outputs gives J_uᵀz of every site at once, for one z; no parameter needs a
gradient.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node, map_arg
from torch.utils._pytree import tree_map_only

from mpq_fx.facts import Choice
from mpq_fx.passes.analyze.metric import IsWanted, Record, Task, Unit, begun
from mpq_fx.passes.analyze.replay import (
    Env,
    Replayer,
    difference,
    finite_norm,
    is_measurable,
)

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
    env = {node: ordinary(value) for node, value in replay.start(record).items()}
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
                operands[site.name] = node, detached(args), detached(kwargs)
            replay.step(env, node, {})
            y = env.get(node)  # dropped already where nobody reads it
            if site is not None and isinstance(y, Tensor) and y.is_floating_point():
                results[site.name] = y if y.requires_grad else y.requires_grad_()
    raise AssertionError("a graph without an output node")


def pull_back(
    at: Linearized, cotangents: Cotangents, sites: Collection[str] | None = None
) -> dict[str, Tensor]:
    """{site: J_uᵀz}, of all sites or some; sites that no output depends on are left out."""
    results = {s: y for s, y in at.results.items() if sites is None or s in sites}
    pairs = [
        (y, z)
        for y, z in zip(at.outputs, cotangents, strict=True)
        if z is not None and isinstance(y, Tensor) and y.requires_grad
    ]
    if not pairs or not results:
        return {}
    outputs, given = zip(*pairs, strict=True)
    found = torch.autograd.grad(
        outputs, [*results.values()], given, retain_graph=True, allow_unused=True
    )
    return {s: g.detach() for s, g in zip(results, found, strict=True) if g is not None}


@dataclass(frozen=True)
class Reached:
    """A site as a walk along the graph comes to it: its result, and what is left to do."""

    site: str
    y: Tensor
    node: Node
    env: Env
    rest: Sequence[Node]


def reached(task: Task, record: Record, is_wanted: IsWanted) -> Iterator[Reached]:
    """The sites of the units for which there is time, in the order of the graph."""
    replay = task.replay
    nodes = list(replay.gm.graph.nodes)
    env = replay.start(record)
    left, wanted = set(task.units), set[str]()
    for at, node in enumerate(nodes):
        if node.op == "output":
            return
        unit = begun(task, node, left)
        if unit is not None and is_wanted(unit):
            wanted.update(unit)
        replay.step(env, node, {})
        site = replay.sites.get(node.name)
        y = env.get(node)
        if site is not None and site.name in wanted and isinstance(y, Tensor):
            yield Reached(site.name, y, node, dict(env), nodes[at + 1 :])


def push_forward(replay: Replayer, at: Reached, direction: Tensor) -> list[Any]:
    """J_u · direction at every output, by a central difference: (y(+h) − y(−h)) / 2h.

    h moves the result of the site by the cube root of its dtype's precision, relative to its RMS,
    where rounding and curvature disturb the difference equally.
    """
    length = float(direction.double().norm())
    if length == 0.0 or not at.y.is_floating_point():
        return [None for _ in replay.finish({**at.env}, at.rest, {})]
    h = torch.finfo(at.y.dtype).eps ** (1 / 3) * float(at.y.double().norm()) / length
    ends = [
        replay.finish({**at.env, at.node: at.y + sign * h * direction}, at.rest, {})
        for sign in (1.0, -1.0)
    ]
    return [
        difference(up.double(), down.double()) / (2 * h) if is_measurable(up) else None
        for up, down in zip(*ends, strict=True)
    ]


def relative_cotangents(task: Task, at: Linearized, tangents: Sequence[Any]) -> Cotangents:
    """t / ‖y‖² of every output that counts: J_uᵀ of it is H · direction for t = J_u · direction,
    H the Hessian of half the relative squared error.
    """
    return [
        t.to(y.dtype) / norm**2
        if t is not None and k not in task.excluded and (norm := finite_norm(y)) > 0
        else None
        for k, (y, t) in enumerate(zip(at.outputs, tangents, strict=True))
    ]


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
    norm = finite_norm(y)
    if norm == 0.0 or y.is_complex():
        return None
    return torch.randint(2, y.shape, generator=generator).mul_(2).sub_(1).to(y) / norm


def ordinary(value: Any) -> Any:
    """Autograd keeps no tensor that was made in inference mode."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def detached(values: Any) -> Any:
    return tree_map_only(Tensor, Tensor.detach, values)
