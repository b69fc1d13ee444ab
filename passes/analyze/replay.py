"""y = graph(inputs), node by node in eager mode, with chosen sites computed as their choice says.

The float path of `numerics.fake_quantize` stands for the integer arithmetic: on the same scales it
gives the same numbers up to float32 rounding, at float speed.  Values are freed after their last
use.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node, map_arg

from mpq_fx.facts import Choice, Site
from mpq_fx.formats import TENSOR, Format, format_named
from mpq_fx.graph import arguments, placeholders
from mpq_fx.numerics import fake_quantize, relative_rms
from mpq_fx.passes.analyze.sites import OPERANDS

ROWS = 1024  # of a weight, fake-quantized at a time
Env = dict[Node, Any]
Scales = Mapping[tuple[str, str], tuple[Tensor, Tensor]]  # (site, activation format) -> scale, zero

# Ops that refuse operands of two float types; glue ops promote by themselves.
_CASTING = (
    "linear",
    "conv",
    "matmul",
    "bmm",
    "addmm",
    "baddbmm",
    "scaled_dot_product_attention",
    "mm",
    "layer_norm",
    "batch_norm",
    "group_norm",
    "rms_norm",
    "lstm",
    "grouped_mm",
)


@dataclass(frozen=True)
class Replayer:
    """A canonical graph with its sites, the parameters' values and what depends on them alone."""

    gm: GraphModule
    sites: Mapping[str, Site]  # by node name
    constants: Env  # parameters and what is computed from them only
    last_use: Mapping[Node, tuple[Node, ...]]
    scales: Scales = field(default_factory=dict)
    weights: dict[tuple[str, str], Tensor] = field(default_factory=dict)  # fake-quantized, cached
    caches: bool = True  # False: in a single run, where they would only take room

    def run(self, inputs: Sequence[Any], choices: Mapping[str, Choice]) -> list[Any]:
        """Outputs with `choices[site name]` applied; float where a site has none."""
        env = self.start(inputs)
        nodes = list(self.gm.graph.nodes)
        return self.finish(env, nodes, choices)

    def start(self, inputs: Sequence[Any]) -> Env:
        env = dict(self.constants)
        for node, given in zip(placeholders(self.gm), inputs, strict=True):
            if node not in env:
                env[node] = given
        return env

    def finish(self, env: Env, nodes: Sequence[Node], choices: Mapping[str, Choice]) -> list[Any]:
        """Run `nodes` (a suffix of the graph) in `env`; returns the outputs."""
        for node in nodes:
            if node.op == "output":
                return list(map_arg(arguments(node)[0], env.__getitem__))
            self.step(env, node, choices)
        raise AssertionError("a graph without an output node")

    def step(self, env: Env, node: Node, choices: Mapping[str, Choice]) -> None:
        """Compute one node into `env` and drop what it used last."""
        if node not in env and node.op != "placeholder":
            site = self.sites.get(node.name)
            choice = choices.get(site.name) if site else None
            args, kwargs = map_arg((node.args, dict(node.kwargs)), env.__getitem__)
            if site and choice is not None:
                env[node] = self.compute(site, choice, node, args, kwargs)
            else:
                env[node] = call(node, args, kwargs)
        for dead in self.last_use.get(node, ()):
            env.pop(dead, None)

    def compute(
        self, site: Site, choice: Choice, node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """One site in the numerics of its choice; the result has the user's dtype again."""
        dtype = node.meta["val"].dtype
        if choice.weight == choice.activation == site.dtype:
            return call(node, args, kwargs)
        if site.op == "residual":
            return self.stored(site, choice, call(node, args, kwargs))
        if format_named(choice.weight).is_plain:
            args = cast(args, getattr(torch, choice.weight))
            return _in(dtype, call(node, args, cast(kwargs, getattr(torch, choice.weight))))
        args = list(args)
        at = OPERANDS[str(node.target)]
        args[at.weight] = self.quantized_weight(site, choice.weight, args[at.weight])
        args[at.activation] = self.quantized_activation(site, choice, args[at.activation])
        return _in(dtype, call(node, cast(args, torch.float32), kwargs))

    def stored(self, site: Site, choice: Choice, x: Tensor) -> Tensor:
        """A residual as it is kept between the ops that read it."""
        return self.quantized_activation(site, choice, x).to(x.dtype)

    def quantized_weight(self, site: Site, fmt: str, w: Tensor) -> Tensor:
        key = site.name, fmt
        if key in self.weights:
            return self.weights[key]
        found = _fake_quantized(w.reshape(w.shape[0], -1), format_named(fmt)).reshape(w.shape)
        if self.caches:
            self.weights[key] = found
        return found

    def stored_weight(self, site: Site, choice: Choice, w: Tensor) -> Tensor:
        """A weight as a choice keeps it, with the numbers it stands for."""
        if format_named(choice.weight).is_plain:
            return cast(w, getattr(torch, choice.weight)).to(w.dtype)
        return self.quantized_weight(site, choice.weight, w)

    def forget(self, sites: Collection[str]) -> None:
        """Free the fake-quantized weights of some sites."""
        for key in [key for key in self.weights if key[0] in sites]:
            del self.weights[key]

    def quantized_activation(self, site: Site, choice: Choice, x: Tensor) -> Tensor:
        fmt = format_named(choice.activation)
        if fmt.is_plain:
            return x.to(getattr(torch, fmt.name)) if x.is_floating_point() else x
        if choice.scaling == "static":
            scale, zero = self.scales[site.name, fmt.name]
            return fake_quantize(x.float(), fmt, scale, zero)
        return fake_quantize(x.float(), fmt)


def _fake_quantized(rows: Tensor, fmt: Format) -> Tensor:
    """fake_quantize(rows) in float32, some rows at a time: an embedding has many, and each step of
    the arithmetic makes one more copy.
    """
    if fmt.block == TENSOR:
        return fake_quantize(rows.float(), fmt)
    found = torch.empty_like(rows, dtype=torch.float32)
    for part, filled in zip(rows.split(ROWS), found.split(ROWS), strict=True):
        filled.copy_(fake_quantize(part.float(), fmt))
    return found


def replayer(
    gm: GraphModule,
    sites: Sequence[Site],
    parameters: Mapping[str, Tensor],
    scales: Scales | None = None,
) -> Replayer:
    """Prepare a graph for replays with the current `parameters` (placeholder name -> tensor)."""
    by_node = {site.node: site for site in sites}
    env: Env = {n: parameters[n.name] for n in placeholders(gm) if n.name in parameters}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            env[node] = _attribute(gm, str(node.target))
        elif is_constant(node, env) and node.name not in by_node:
            args, kwargs = map_arg((node.args, dict(node.kwargs)), env.__getitem__)
            env[node] = call(node, args, kwargs)
    return Replayer(gm, by_node, env, _last_uses(gm, env), scales or {})


def is_constant(node: Node, known: Mapping[Node, Any]) -> bool:
    """Is `node` a call whose operands are all known, so that it never changes between calls?"""
    inputs = node.all_input_nodes
    return node.op == "call_function" and bool(inputs) and all(n in known for n in inputs)


def call(node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run one node; a write to an input of the graph yields the new value and leaves it alone."""
    if node.target is torch.ops.aten.copy_.default and arguments(node)[0].op == "placeholder":
        return args[1]
    target: Callable[..., Any] = node.target  # type: ignore[assignment]
    return target(*args, **kwargs)


def cast(values: Any, dtype: torch.dtype) -> Any:
    """Every floating tensor among nested arguments in `dtype`."""
    if isinstance(values, Tensor):
        return values.to(dtype) if values.is_floating_point() else values
    if isinstance(values, Mapping):
        return {key: cast(value, dtype) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return type(values)(cast(value, dtype) for value in values)
    return values


def run_in(replay: Replayer, inputs: Sequence[Any], dtype: torch.dtype) -> list[Any]:
    """The whole graph in `dtype`, as `model.to(dtype)` would run: the bfloat16 yardstick.

    Explicit casts of the user's code stay; ops that refuse mixed operands get theirs cast, and ops
    that PyTorch has not in `dtype` (a Fourier transform) run in float32.
    """
    env = {
        node: cast(given, dtype)
        for node, given in replay.start(inputs).items()
        if node.op in ("placeholder", "get_attr")
    }
    for node in replay.gm.graph.nodes:
        if node.op == "output":
            return list(map_arg(arguments(node)[0], env.__getitem__))
        if node.op == "call_function":
            args, kwargs = map_arg((node.args, dict(node.kwargs)), env.__getitem__)
            if any(name in str(node.target) for name in _CASTING):
                args, kwargs = cast(args, dtype), cast(kwargs, dtype)
            env[node] = _call_in(dtype, node, args, kwargs)
        for dead in replay.last_use.get(node, ()):
            env.pop(dead, None)
    raise AssertionError("a graph without an output node")


def output_error(
    outputs: Sequence[Any], reference: Sequence[Any], excluded: frozenset[int] = frozenset()
) -> float:
    """max over outputs of ‖y − y_ref‖ / ‖y_ref‖; `excluded` are positions of cache outputs."""
    errors = [
        relative_rms(as_real(y), as_real(ref))
        for k, (y, ref) in enumerate(zip(outputs, reference, strict=True))
        if k not in excluded and is_measurable(ref) and ref.numel()
    ]
    return max(errors, default=0.0)


def worst_error(
    runs: Iterable[Sequence[Any]],
    references: Iterable[Sequence[Any]],
    excluded: frozenset[int] = frozenset(),
) -> float:
    """The largest `output_error` of some calls."""
    both = zip(runs, references, strict=True)
    return max(output_error(outputs, reference, excluded) for outputs, reference in both)


def is_measurable(output: Any) -> bool:
    """Does an output have an error: floating or complex, not an index or a flag?"""
    return isinstance(output, Tensor) and (output.is_floating_point() or output.is_complex())


def is_logits(output: Any) -> bool:
    """Can an output be read as logits along its last dimension?"""
    is_real = isinstance(output, Tensor) and output.is_floating_point()
    return is_real and output.dim() > 0 and output.numel() > 0


def as_real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def difference(y: Tensor, ref: Tensor) -> Tensor:
    """y − ref; 0 where both are the same infinity, or both NaN, as masked logits are -inf.

    What else is not finite stays so.
    """
    odd = ~ref.isfinite()
    if not bool(odd.any()):
        return y - ref
    is_same = odd & ((y == ref) | (y.isnan() & ref.isnan()))
    return (y - ref).masked_fill(is_same, 0.0)


def finite_norm(ref: Tensor) -> float:
    """‖ref‖ of its finite numbers, which errors are relative to"""
    return float(as_real(ref.detach()).double().nan_to_num(0.0, 0.0, 0.0).norm())


def _call_in(dtype: torch.dtype, node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    try:
        return call(node, args, kwargs)
    except (RuntimeError, NotImplementedError):  # no such kernel: the message is PyTorch's own
        wide = call(node, cast(args, torch.float32), cast(kwargs, torch.float32))
        return cast(wide, dtype)


def _in(dtype: torch.dtype, result: Any) -> Any:
    return result.to(dtype) if isinstance(result, Tensor) else result


def _attribute(gm: GraphModule, path: str) -> Any:
    found: Any = gm
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _last_uses(gm: GraphModule, constants: Env) -> dict[Node, tuple[Node, ...]]:
    """node -> the values nobody reads after it; constants are kept for the next replay."""
    seen: set[Node] = set(constants)
    last: dict[Node, tuple[Node, ...]] = {}
    for node in reversed(gm.graph.nodes):
        if node.op == "output":
            seen.update(node.all_input_nodes)
            continue
        dead = tuple(n for n in {*node.all_input_nodes, node} if n not in seen)
        seen.update(dead)
        last[node] = dead
    return last
