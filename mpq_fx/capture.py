"""Dynamo graph  ->  functional pre-dispatch ATen graph; the one file that touches torch's private API.

    retrace      torch functions -> ATen ops that are still whole (linear, conv2d, sdpa); vmap expanded
    explicit     autocast -> casts, learnt from the dispatcher itself; in-place -> out-of-place,
                 each mutated input written once, at the end, by one copy_
What cannot be captured faithfully is refused with a reason; the graph then stays Dynamo's own.
"""

from __future__ import annotations

import contextlib
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx.traceback
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from mpq_fx.graph import output_of, placeholders

DEVICES = ("cpu", "cuda")
MARKERS = ("_set_grad_enabled", "record_function", "_inference_mode")
VMAP_ENTER, VMAP_EXIT = "_vmap_increment_nesting", "_vmap_decrement_nesting"
ASSERT = torch.ops.aten._assert_tensor_metadata.default
CASTS = (torch.ops.aten.to.dtype, torch.ops.aten._to_copy.default)
Autocast = tuple[tuple[str, torch.dtype], ...]


@dataclass(frozen=True)
class Captured:
    """A graph to optimize, or Dynamo's own graph with the reason why it cannot be."""

    gm: GraphModule
    parameters: Mapping[str, str] = field(default_factory=dict)  # placeholder -> "encoder.0.weight"
    mutated: tuple[str, ...] = ()  # placeholders that the graph writes to (KV caches, buffers)
    refusal: str = ""


class _RefusedError(Exception):
    """A construct that cannot be captured faithfully; becomes `Captured.refusal`."""


def capture(gm: GraphModule, example_inputs: Sequence[Any]) -> Captured:
    """Dynamo graph -> functional ATen graph with the same placeholders, values and sources."""
    sources = _sources(gm, example_inputs)
    try:
        _refuse_inputs(gm, example_inputs)
        fakes = [node.meta["example_value"] for node in placeholders(gm)]
        traced = _retrace(gm, fakes)
        mutated = _mutated_inputs(traced, example_inputs)
        traced = _make_explicit(traced, fakes, functional=_mutates(traced))
        _refuse_leftovers(traced)
    except _RefusedError as refused:
        return Captured(gm, sources, refusal=str(refused))
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ValueError) as error:
        first = str(error).strip().splitlines() or [""]
        return Captured(gm, sources, refusal=f"tracing to ATen failed: {first[0]}")
    names = [node.name for node in placeholders(gm)]
    for node, name in zip(placeholders(traced), names, strict=True):
        node._rename(name)
        node.target = node.name
    _remove_markers(traced)
    return Captured(traced, sources, tuple(names[index] for index in mutated))


def _remove_markers(gm: GraphModule) -> None:
    for node in gm.graph.find_nodes(op="call_function", target=ASSERT):
        gm.graph.erase_node(node)
    for node in gm.graph.nodes:
        node.meta.get("custom", {}).pop("autocast", None)
    gm.graph.eliminate_dead_code()
    gm.recompile()


# --- sources -----------------------------------------------------------------------------------


def _sources(gm: GraphModule, example_inputs: Sequence[Any]) -> dict[str, str]:
    """Which placeholders hold parameters or buffers, and their dotted path in the frame."""
    found = {}
    for node, example in zip(placeholders(gm), example_inputs, strict=True):
        source = _source_name(node)
        owned = "_parameters['" in source or "_buffers['" in source
        if owned or isinstance(example, torch.nn.Parameter):
            found[node.name] = qualified(source) or node.name
    return found


def _source_name(node: Node) -> str:
    source = getattr(node, "_dynamo_source", None)
    if source is None and "grapharg" in node.meta:
        source = node.meta["grapharg"].source
    name = getattr(source, "name", "")
    return name() if callable(name) else str(name)


def qualified(source: str) -> str:
    """L['self']._modules['encoder']._modules['0']._parameters['weight'] -> encoder.0.weight"""
    source = re.sub(r"^[LG]\['(self|fn)'\]", "", source)
    source = re.sub(r"^[LG](?=\[)", "", source)
    source = re.sub(r"\._(modules|parameters|buffers)(?=\[)", "", source)
    return re.sub(r"\['?([^]']*)'?\]", r".\1", source).strip(".")


# --- refusals ----------------------------------------------------------------------------------


def _refuse_inputs(gm: GraphModule, example_inputs: Sequence[Any]) -> None:
    for node, example in zip(placeholders(gm), example_inputs, strict=True):
        if "example_value" not in node.meta:
            raise _RefusedError(f"input {node.name} is not a tensor or a size")
        if not isinstance(example, Tensor):
            continue
        name = qualified(_source_name(node)) or node.name
        for bad, what in (
            (example.layout != torch.strided, f"{example.layout} layout"),
            (example.is_complex(), "complex values"),
            (example.is_quantized, "torch.quantize values"),
            (type(example) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer, FakeTensor),
             f"the tensor subclass {type(example).__name__}"),
        ):  # fmt: skip
            if bad:
                raise _RefusedError(f"input {name} has {what}")


def _refuse_leftovers(gm: GraphModule) -> None:
    """Only ATen ops, custom ops and size arithmetic may be left, and every constant must be real."""
    for node in gm.graph.nodes:
        if node.op == "get_attr" and _is_lost(getattr(gm, str(node.target), None)):
            raise _RefusedError(f"tracing lost the value of {node.name} ({_user_line(node)})")
        if node.op in ("call_module", "call_method"):
            raise _RefusedError(f"{node.target} is not an ATen op ({_user_line(node)})")
        known = isinstance(node.target, torch._ops.OpOverload) or (
            getattr(node.target, "__module__", "") in (operator.__name__, "_operator", "math")
            or getattr(node.target, "__name__", "").startswith("sym_")
        )
        if node.op == "call_function" and not known:
            raise _RefusedError(f"{node.target} is not an ATen op ({_user_line(node)})")


def _is_lost(value: Any) -> bool:
    return not isinstance(value, Tensor) or type(value) not in (Tensor, torch.nn.Parameter)


def _user_line(node: Node) -> str:
    frames = [line for line in (node.meta.get("stack_trace") or "").splitlines() if "File " in line]
    return frames[-1].strip() if frames else "no source line"


# --- retrace: torch functions -> ATen -----------------------------------------------------------


def _retrace(gm: GraphModule, fakes: Sequence[Any]) -> GraphModule:
    """make_fx before autograd and autocast dispatch, in the fake mode that Dynamo used."""
    with _fake_mode(fakes), torch.fx.traceback.preserve_node_meta(), torch.no_grad():
        with _autocast_set(_autocast_state()):  # restored however the regions of the graph nest
            traced = _trace(_Dynamo(gm).run, fakes)
    _describe_constants(traced, _fake_mode(fakes))
    return traced


def _describe_constants(gm: GraphModule, mode: FakeTensorMode) -> None:
    for node in gm.graph.find_nodes(op="get_attr"):
        constant = getattr(gm, str(node.target))
        if not _is_lost(constant):
            node.meta["val"] = mode.from_tensor(constant, static_shapes=True)


def _trace(run: Callable[..., Any], fakes: Sequence[Any], *, pre_dispatch: bool = True) -> Any:
    tracer = make_fx(
        run, pre_dispatch=pre_dispatch, tracing_mode="real", _allow_non_fake_inputs=True
    )
    return tracer(*fakes)


def _fake_mode(fakes: Sequence[Any]) -> FakeTensorMode:
    modes = [fake.fake_mode for fake in fakes if isinstance(fake, FakeTensor)]
    if not modes:
        raise _RefusedError("the graph has no tensor inputs")
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
            return _entered(*n.args)
        if n.target is _exit_autocast:
            return _left(self.env[n.all_input_nodes[0]])
        if n.op == "call_function" and any(marker in name for marker in MARKERS):
            return None
        n.meta["custom"] = {**n.meta.get("custom", {}), "autocast": _autocast_state()}
        return super().run_node(n)

    def _expand(self, region: list[Node]) -> None:
        """vmap(f)(x) -> batched ATen ops: traced below vmap, then replayed into this trace."""
        inputs, outputs, body = _as_function(self.module, region)
        values = [self.env[node] for node in inputs]
        fakes = [node.meta["example_value"] for node in inputs]
        graph = _trace(body, fakes, pre_dispatch=False)
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


# --- autocast ----------------------------------------------------------------------------------


def _autocast_state() -> Autocast:
    return tuple(
        (device, torch.get_autocast_dtype(device))
        for device in DEVICES
        if torch.is_autocast_enabled(device)
    )


@contextlib.contextmanager
def _autocast_set(state: Autocast) -> Iterator[None]:
    """Autocast exactly as in `state`, set without a trace in the graph."""
    before = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in DEVICES]
    wanted = dict(state)
    for device, _, dtype in before:
        torch.set_autocast_enabled(device, device in wanted)
        torch.set_autocast_dtype(device, wanted.get(device, dtype))
    try:
        yield
    finally:
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


class _Spy(TorchDispatchMode):
    """Sits below autocast: the calls that an op really makes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.prim.device.default:  # asked by the dispatcher for each argument
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class _Casts:
    """What autocast does to one call: a dtype per tensor argument, and an output dtype to name."""

    dtypes: tuple[torch.dtype, ...]
    out: torch.dtype | None


def _casts_of(node: Node) -> _Casts | None:
    """Asks the dispatcher: runs the op on fakes under its autocast and looks from below."""
    state: Autocast = node.meta.get("custom", {}).get("autocast", ())
    op = node.target
    if not state or not isinstance(op, torch._ops.OpOverload):
        return None
    args, kwargs = tree_map_only(Node, lambda n: n.meta["val"], (node.args, node.kwargs))
    spy = _Spy()
    with _autocast_set(state), torch._C._AutoDispatchBelowAutograd(), spy:
        op(*args, **kwargs)
    *casts, (last, last_args, last_kwargs) = spy.calls
    plain = all(func in CASTS for func, _, _ in casts)
    before, after = _tensors((args, kwargs)), _tensors((last_args, last_kwargs))
    if last is not op or not plain or len(before) != len(after):
        raise _RefusedError(f"autocast rewrites {op} into other ops ({_user_line(node)})")
    _refuse_hidden_casts(node, state, args, kwargs)
    dtypes = tuple(tensor.dtype for tensor in after)
    out = last_kwargs.get("dtype") if kwargs.get("dtype") is None else None
    if dtypes == tuple(tensor.dtype for tensor in before) and out is None:
        return None
    return _Casts(dtypes, out)


def _refuse_hidden_casts(node: Node, state: Autocast, args: Any, kwargs: Any) -> None:
    """A composite op (lstm) that autocast leaves alone, but whose parts it casts."""
    op: Any = node.target
    key = "AutocastCUDA" if state[0][0] == "cuda" else "AutocastCPU"
    composite = torch._C._dispatch_has_kernel_for_dispatch_key
    if not composite(op.name(), "CompositeImplicitAutograd") or composite(op.name(), key):
        return
    counts = []
    for inner in (state, ()):
        spy = _Spy()
        with _autocast_set(inner), spy:
            op.decompose(*args, **kwargs)
        counts.append(sum(func in CASTS for func, _, _ in spy.calls))
    if counts[0] != counts[1]:
        raise _RefusedError(f"{op} under autocast casts inside ({_user_line(node)})")


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


# --- explicit: no autocast, no mutation -----------------------------------------------------------


def _make_explicit(gm: GraphModule, fakes: Sequence[Any], *, functional: bool) -> GraphModule:
    """Second trace, only where needed: casts written out, mutations turned into values."""
    casts = {node: found for node in gm.graph.nodes if (found := _casts_of(node))}
    if not casts and not functional:
        return gm
    run: Callable[..., Any] = _Explicit(gm, casts).run
    if functional:
        run = _functionalized(run)
    with _fake_mode(fakes), torch.fx.traceback.preserve_node_meta(), torch.no_grad():
        with _autocast_set(()):
            traced = _trace(run, fakes)
    _describe_constants(traced, _fake_mode(fakes))
    return traced


class _Explicit(Interpreter):
    """Runs an ATen graph with the casts of autocast written out."""

    def __init__(self, gm: GraphModule, casts: Mapping[Node, _Casts]) -> None:
        super().__init__(gm)
        self.casts = casts
        self.current: Node | None = None

    def run_node(self, n: Node) -> Any:
        self.current = n
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        casts = self.casts.get(self.current) if self.current else None
        if casts is None:
            return super().call_function(target, args, kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        dtypes = iter(casts.dtypes)
        leaves = [
            _cast(leaf, next(dtypes)) if isinstance(leaf, Tensor) else leaf for leaf in leaves
        ]
        args, kwargs = tree_unflatten(leaves, spec)
        if casts.out is not None:
            kwargs = {**kwargs, "dtype": casts.out}
        return super().call_function(target, args, kwargs)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _functionalized(run: Callable[..., Any]) -> Callable[..., Any]:
    """x.add_(1); f(x)  ->  y = x + 1; f(y); x.copy_(y)"""
    mode = FunctionalTensorMode(pre_dispatch=True, export=True)

    def inner(*inputs: Any) -> Any:
        exclude = torch._C.DispatchKeySet(torch._C.DispatchKey.Functionalize)
        with torch._C._ExcludeDispatchKeyGuard(exclude), mode:
            wrapped = tree_map_only(Tensor, FunctionalTensor.to_functional, list(inputs))
            results = run(*wrapped)
            plain = tree_map_only(FunctionalTensor, _unwrapped, results)
            written = [
                (old, _unwrapped(new), new)
                for old, new in zip(inputs, wrapped, strict=True)
                if isinstance(new, FunctionalTensor) and _is_written(new)
            ]
        for old, value, _ in written:
            old.copy_(value)
        same = {id(new): old for old, _, new in written}
        leaves, spec = tree_flatten(results)
        values = zip(leaves, tree_leaves(plain), strict=True)
        return tree_unflatten([same.get(id(leaf), value) for leaf, value in values], spec)

    return inner


def _unwrapped(tensor: FunctionalTensor) -> Tensor:
    torch._sync(tensor)
    return torch._from_functional_tensor(tensor.elem)


def _is_written(tensor: FunctionalTensor) -> bool:
    if torch._functionalize_has_metadata_mutation(tensor.elem):
        raise _RefusedError("the graph changes the shape or strides of an input in place")
    return torch._functionalize_has_data_mutation(tensor.elem)


def _mutates(gm: GraphModule) -> bool:
    return any(_is_mutable(node) for node in gm.graph.nodes)


def _is_mutable(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _mutated_inputs(gm: GraphModule, example_inputs: Sequence[Any]) -> list[int]:
    """Positions of inputs that the graph writes to; refuses what a final copy_ would get wrong."""
    written = {
        _storage(argument)
        for node in gm.graph.nodes
        if _is_mutable(node)
        for argument in _written_arguments(node)
    }
    nodes = placeholders(gm)
    found = [i for i, node in enumerate(nodes) if _storage(node) in written]
    for index in found:
        _refuse_aliases(gm, nodes, example_inputs, index)
    return found


def _written_arguments(node: Node) -> Iterator[Node]:
    schema = node.target._schema  # type: ignore[union-attr]
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        yield from (leaf for leaf in tree_leaves(given) if isinstance(leaf, Node))


def _storage(node: Node) -> Any:
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else node


def _refuse_aliases(
    gm: GraphModule, nodes: Sequence[Node], example_inputs: Sequence[Any], index: int
) -> None:
    for leaf in tree_leaves(output_of(gm).args):
        if isinstance(leaf, Node) and _storage(leaf) == _storage(nodes[index]):
            value, mutated = leaf.meta["val"], nodes[index].meta["val"]
            if value.shape != mutated.shape or value.stride() != mutated.stride():
                raise _RefusedError(
                    "an output is a view of an input that the graph changes in place"
                )
    mine = example_inputs[index].untyped_storage().data_ptr()
    for other, example in enumerate(example_inputs):
        if other == index or not isinstance(example, Tensor) or not mine:
            continue
        if example.untyped_storage().data_ptr() == mine:
            raise _RefusedError(
                "two inputs share memory and the graph changes one of them in place"
            )
