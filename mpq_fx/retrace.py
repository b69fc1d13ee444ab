"""Dynamo graph  ->  ATen graph before autograd and autocast, with its nodes' provenance

Ops stay whole (linear, conv2d, scaled_dot_product_attention), sizes symbolic.  A vmap region is
traced below vmap first: traced whole, it would lose the values of batched constants.  What autocast
was on is noted on each node, for `explicit`.  An op that computes a whole module becomes its parts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.fx.traceback
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: TID251 -- capture's
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx

from mpq_fx.fused_modules import PARTS

DEVICES = ("cpu", "cuda")
MARKERS = ("_set_grad_enabled", "record_function", "_inference_mode")
VMAP_ENTER, VMAP_EXIT = "_vmap_increment_nesting", "_vmap_decrement_nesting"
Autocast = tuple[tuple[str, torch.dtype], ...]


class RefusedError(Exception):
    """A construct that cannot be captured faithfully; becomes `Captured.refusal`."""


def user_line(node: Node) -> str:
    frames = [line for line in (node.meta.get("stack_trace") or "").splitlines() if "File " in line]
    return frames[-1].strip() if frames else "no source line"


def retrace(gm: GraphModule, fakes: Sequence[Any]) -> GraphModule:
    """make_fx before autograd and autocast dispatch, in the fake mode that Dynamo used."""
    # Ambient autocast stays on, and is restored however the regions of the graph nest.
    with tracing(fakes), autocast_set(autocast_state()):
        traced = trace(_Dynamo(gm).run, fakes)
    describe_constants(traced, fake_mode_of_inputs(fakes))
    return traced


@contextlib.contextmanager
def tracing(fakes: Sequence[Any]) -> Iterator[None]:
    with fake_mode_of_inputs(fakes), torch.fx.traceback.preserve_node_meta(), torch.no_grad():
        yield


def describe_constants(gm: GraphModule, mode: FakeTensorMode) -> None:
    for node in gm.graph.find_nodes(op="get_attr"):
        constant = getattr(gm, str(node.target))
        if not is_lost(constant):
            node.meta["val"] = mode.from_tensor(constant, static_shapes=True)


def trace(run: Callable[..., Any], fakes: Sequence[Any], *, pre_dispatch: bool = True) -> Any:
    tracer = make_fx(
        run, pre_dispatch=pre_dispatch, tracing_mode="real", _allow_non_fake_inputs=True
    )
    return tracer(*fakes)


def fake_mode_of_inputs(fakes: Sequence[Any]) -> FakeTensorMode:
    modes = [fake.fake_mode for fake in fakes if isinstance(fake, FakeTensor)]
    if not modes:
        raise RefusedError("the graph has no tensor inputs")
    return modes[0]


class _Dynamo(Interpreter):
    """Runs Dynamo's graph: markers dropped, autocast remembered per node, vmap regions expanded."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.regions = {region[0]: region for region in _vmap_regions(gm)}
        self.skip: set[Node] = set()

    def run_node(self, n: Node) -> Any:
        if n in self.skip:
            return self.env.get(n)
        if n in self.regions:
            return self._expand(self.regions[n])
        name = getattr(n.target, "__name__", str(n.target))
        if n.target is _enter_autocast:
            return _entered(*n.args)  # type: ignore[arg-type]
        if n.target is _exit_autocast:
            return _left(self.env[n.all_input_nodes[0]])
        if n.op == "call_function" and any(marker in name for marker in MARKERS):
            return None
        n.meta["custom"] = {**n.meta.get("custom", {}), "autocast": autocast_state()}
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(PARTS.get(target, target), args, kwargs)

    def _expand(self, region: list[Node]) -> None:
        """vmap(f)(x) -> batched ATen ops: traced below vmap, then replayed into this trace."""
        inputs, outputs, body = _as_function(self.module, region)
        values = [self.env[node] for node in inputs]
        fakes = [node.meta["example_value"] for node in inputs]
        graph = trace(body, fakes, pre_dispatch=False)
        for node, result in zip(outputs, Interpreter(graph).run(*values), strict=True):
            self.env[node] = result
        self.skip.update(region)


def _vmap_regions(gm: GraphModule) -> Iterator[list[Node]]:
    """Runs of nodes from the outermost vmap entry to its exit."""
    region: list[Node] = []
    depth = 0
    for node in gm.graph.nodes:
        name = getattr(node.target, "__name__", "")
        depth += name == VMAP_ENTER
        if depth:
            region.append(node)
        depth -= name == VMAP_EXIT
        if region and not depth:
            yield region
            region = []


def _as_function(owner: Any, region: list[Node]) -> tuple[list[Node], list[Node], Any]:
    """(outer nodes read, inner nodes read later, a callable) of a run of nodes."""
    inside = set(region)
    inputs = [*dict.fromkeys(i for n in region for i in n.all_input_nodes if i not in inside)]
    outputs = [node for node in region if any(user not in inside for user in node.users)]
    graph = torch.fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in inputs}
    for node in region:
        copies[node] = graph.node_copy(node, lambda old: copies[old])
    graph.output([copies[node] for node in outputs])
    return inputs, outputs, Interpreter(GraphModule(owner, graph)).run


def is_lost(value: Any) -> bool:
    return not isinstance(value, Tensor) or type(value) not in (Tensor, torch.nn.Parameter)


def autocast_state() -> Autocast:
    return tuple(
        (device, torch.get_autocast_dtype(device))
        for device in DEVICES
        if torch.is_autocast_enabled(device)
    )


@contextlib.contextmanager
def autocast_set(state: Autocast) -> Iterator[None]:
    """Autocast exactly as in `state`, set without a trace in the graph."""
    before = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in DEVICES]
    wanted, caching = dict(state), torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # fake casts must not outlive the trace
    for device, _, dtype in before:
        torch.set_autocast_enabled(device, device in wanted)
        torch.set_autocast_dtype(device, wanted.get(device, dtype))
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(caching)
        for device, enabled, dtype in before:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)


def _entered(device: str, dtype: torch.dtype | None, enabled: bool, *_: Any) -> Any:
    context = torch.autocast(device, dtype=dtype, enabled=enabled)
    with torch._C.DisableTorchFunction():  # else the trace would hold a marker instead
        return context.__enter__()


def _left(context: Any) -> None:
    with torch._C.DisableTorchFunction():
        context.__exit__(None, None, None)
