"""The shortest backend that uses capture: FX runs the canonical graph, nothing is compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from mpq_fx.capture import Captured, capture
from mpq_fx.facts import Site
from mpq_fx.graph import mark_weights, placeholders, run_passes
from mpq_fx.numerics import relative_rms
from mpq_fx.passes import CANONICALIZE
from mpq_fx.passes.analyze.sites import find_sites


class Toy:
    """backend(gm, inputs): captures, runs `passes`, and remembers what came out."""

    def __init__(self, passes: Sequence[Any] = CANONICALIZE) -> None:
        self.passes = passes
        self.captured: list[Captured] = []
        self.logs: list[dict[str, int]] = []

    def __call__(self, gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        captured = capture(gm, inputs)
        if not captured.refusal:
            mark_weights(captured.gm, captured.parameters.keys() - {*captured.mutated})
            self.logs.append(dict(run_passes(captured.gm, self.passes)))
        self.captured.append(captured)
        return captured.gm.forward if captured.refusal else without_autocast(captured.gm)

    def compile(self, net: Any) -> Any:
        torch.compiler.reset()
        return torch.compile(net, backend=self)

    @property
    def graph(self) -> GraphModule:
        """Of the last captured graph, which must not have been refused."""
        assert not self.captured[-1].refusal, self.captured[-1].refusal
        return self.captured[-1].gm

    @property
    def sites(self) -> dict[str, Site]:
        found = find_sites(self.graph, self.captured[-1].parameters)
        assert len({site.name for site in found}) == len(found), "names of sites clash"
        return {site.name: site for site in found}


def without_autocast(gm: GraphModule) -> Callable[..., Any]:
    """The casts are in the graph: autocast around it would cast what the user excluded."""

    def run(*inputs: Any) -> Any:
        with torch._C._DisableAutocast():
            return gm(*inputs)

    return run


def graph_of(
    function: Callable[..., Any], inputs: Sequence[Tensor], weights: Sequence[Tensor] = ()
) -> GraphModule:
    """The ATen graph of function(*inputs, *weights) with the weights marked, without Dynamo."""
    with torch.no_grad():
        tracer = make_fx(function, pre_dispatch=True, tracing_mode="fake")
        gm = tracer(*inputs, *weights)
    mark_weights(gm, [node.name for node in placeholders(gm)[len(inputs) :]])
    return gm


def called(net: nn.Module | Callable[..., Any], inputs: Any) -> list[Tensor]:
    """The tensors that a net returns for a dict or a tuple of inputs."""
    result = net(**inputs) if isinstance(inputs, dict) else net(*inputs)
    leaves = tree_leaves(dict(result) if hasattr(result, "keys") else result)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def worst(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """The largest relative RMS error over outputs of equal dtype."""
    assert [g.dtype for g in got] == [w.dtype for w in want]
    pairs = zip(got, want, strict=True)
    return max(float(relative_rms(g.float(), w.float())) for g, w in pairs)
