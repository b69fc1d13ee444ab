"""y_u = Σ_c share[u, c] · y_u(c): a graph whose sites are mixtures of their choices

y_u(c) is site u in choice c at the operands that the sites before it left.  Rounding has no useful
derivative: on the way back a site is its float op at those operands (straight-through), so that
∂noise/∂share[u, c] = ⟨g_u, y_u(c)⟩ for g_u, the gradient at the result of u.  A mixture of one
choice per site is a plan, with the plan's own error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node, map_arg

from mpq_fx.facts import Choice, Site
from mpq_fx.passes.analyze.linearize import Operands, detached, ordinary
from mpq_fx.passes.analyze.metric import Key, Record
from mpq_fx.passes.analyze.replay import Env, Replayer, as_real, call, is_measurable


@dataclass(frozen=True)
class Mixture:
    """How much of each choice a site has; a choice without a share is not computed."""

    replay: Replayer
    options: Mapping[str, tuple[Choice, ...]]
    shares: Mapping[Key, float]

    def result(self, site: Site, operands: Operands, own: Tensor) -> Tensor:
        """Σ_c share · y(c); `own` is y in the site's own precision, which is computed anyway."""
        total = torch.zeros_like(own)
        for choice in self.choices(site.name):
            share = self.shares[site.name, choice.name]
            if share == 1.0:
                return self.alone(site, choice, operands, own)
            if share != 0.0:
                total += share * self.alone(site, choice, operands, own)
        return total

    def choices(self, site: str) -> list[Choice]:
        """Those that have a share, be it 0."""
        return [choice for choice in self.options[site] if (site, choice.name) in self.shares]

    def alone(self, site: Site, choice: Choice, operands: Operands, own: Tensor) -> Tensor:
        if choice == self.options[site.name][0]:
            return own
        return self.replay.compute(site, choice, *operands)


class _StraightThrough(torch.autograd.Function):
    """value, with the derivative of `way`"""

    @staticmethod
    def forward(ctx: Any, value: Tensor, way: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        return None, gradient


@dataclass(frozen=True)
class _Walked:
    """One run of a mixture: outputs, results of its sites, and what the sites read."""

    outputs: list[Any]
    results: Mapping[str, Tensor]
    operands: Mapping[str, Operands]


def mixed(
    mixture: Mixture, record: Record, reference: Sequence[Any], excluded: frozenset[int]
) -> tuple[float, dict[Key, float]]:
    """(noise power of the worst output, {(site, choice): its derivative by the share})

    A share that no output depends on has derivative 0.  The noise is inf, and the derivatives 0,
    where a result is not finite.
    """
    flat = dict.fromkeys(mixture.shares, 0.0)
    with torch.enable_grad():
        walked = _walk(mixture, record)
        noise = _noise(walked.outputs, reference, excluded)
    if noise is None:
        return 0.0, flat
    if not math.isfinite(noise.item()):
        return math.inf, flat
    if not noise.requires_grad or not walked.results:
        return noise.item(), flat
    results = walked.results
    given = torch.autograd.grad(noise, [*results.values()], allow_unused=True)
    at = {site: g for site, g in zip(results, given, strict=True) if g is not None}
    return noise.item(), flat | _derivatives(mixture, walked, at)


def _walk(mixture: Mixture, record: Record) -> _Walked:
    replay = mixture.replay
    results: dict[str, Tensor] = {}
    operands: dict[str, Operands] = {}
    env: Env = {node: ordinary(value) for node, value in replay.start(record).items()}
    for node in replay.gm.graph.nodes:
        if node.op == "output":
            return _Walked(list(map_arg(node.args[0], env.__getitem__)), results, operands)
        site = replay.sites.get(node.name)
        if site is not None and site.name in mixture.options:
            env[node], operands[site.name] = _mixed_site(mixture, site, node, env)
            results[site.name] = env[node]
        replay.step(env, node, {})
    raise AssertionError("a graph without an output node")


def _mixed_site(mixture: Mixture, site: Site, node: Node, env: Env) -> tuple[Tensor, Operands]:
    args, kwargs = map_arg((node.args, dict(node.kwargs)), env.__getitem__)
    way = call(node, args, kwargs)
    operands = node, detached(args), detached(kwargs)
    with torch.no_grad():
        value = mixture.result(site, operands, way.detach())
    if way.requires_grad:
        return _StraightThrough.apply(value, way), operands
    return value.clone().requires_grad_(), operands


def _noise(
    outputs: Sequence[Any], reference: Sequence[Any], excluded: frozenset[int]
) -> Tensor | None:
    """max over outputs of Σ (y − y_ref)² / Σ y_ref², in float64; None where nothing is measured."""
    worst: Tensor | None = None
    for k, (y, ref) in enumerate(zip(outputs, reference, strict=True)):
        if k in excluded or not is_measurable(ref) or not ref.numel():
            continue
        want = as_real(ref).double()
        finite = torch.isfinite(want)
        signal = want[finite].square().sum()
        if signal > 0:
            noise = (as_real(y).double() - want)[finite].square().sum() / signal
            worst = noise if worst is None or noise.item() > worst.item() else worst
    return worst


def _derivatives(
    mixture: Mixture, walked: _Walked, gradients: Mapping[str, Tensor]
) -> dict[Key, float]:
    """⟨g_u, y_u(c)⟩ of every choice, one result at a time."""
    found: dict[Key, float] = {}
    sites = {site.name: site for site in mixture.replay.sites.values()}
    with torch.no_grad():
        for name, gradient in gradients.items():
            node, args, kwargs = walked.operands[name]
            own = call(node, args, kwargs)
            for choice in mixture.choices(name):
                y = mixture.alone(sites[name], choice, (node, args, kwargs), own)
                found[name, choice.name] = float((gradient.double() * y.double()).sum())
    return found
