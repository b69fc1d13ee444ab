"""autocast  ->  casts in the graph;  x.add_(1)  ->  y = x + 1, …, x.copy_(y) at the end

What autocast does to an op is asked of the dispatcher, not kept in a list: the op runs on fake
values under its autocast, and a spy below sees the dtypes in which it is really called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import (  # noqa: TID251 -- capture's
    FunctionalTensor,
    FunctionalTensorMode,
)
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from mpq_fx.graph import output_of, placeholders
from mpq_fx.retrace import (
    Autocast,
    RefusedError,
    autocast_set,
    describe_constants,
    fake_mode_of_inputs,
    trace,
    tracing,
    user_line,
)

CASTS = (torch.ops.aten.to.dtype, torch.ops.aten._to_copy.default)


def make_explicit(gm: GraphModule, fakes: Sequence[Any], *, functional: bool) -> GraphModule:
    """Second trace, only where needed: casts written out, mutations turned into values."""
    with fake_mode_of_inputs(fakes):
        casts = {node: found for node in gm.graph.nodes if (found := _casts_of(node))}
    if not casts and not functional:
        return gm
    run: Callable[..., Any] = _Explicit(gm, casts).run
    if functional:
        run = _functionalized(run)
    with tracing(fakes), autocast_set(()):
        traced = trace(run, fakes)
    describe_constants(traced, fake_mode_of_inputs(fakes))
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
        raise RefusedError("the graph changes the shape or strides of an input in place")
    return torch._functionalize_has_data_mutation(tensor.elem)  # type: ignore[attr-defined]


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
    with autocast_set(state), torch._C._AutoDispatchBelowAutograd(), spy:
        op(*args, **kwargs)
    *casts, (last, last_args, last_kwargs) = spy.calls
    plain = all(func in CASTS for func, _, _ in casts)
    before, after = _tensors((args, kwargs)), _tensors((last_args, last_kwargs))
    if last is not op or not plain or len(before) != len(after):
        raise RefusedError(f"autocast rewrites {op} into other ops ({user_line(node)})")
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
        with autocast_set(inner), spy:
            op.decompose(*args, **kwargs)
        counts.append(sum(func in CASTS for func, _, _ in spy.calls))
    if counts[0] != counts[1]:
        raise RefusedError(f"{op} under autocast casts inside ({user_line(node)})")


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def mutates(gm: GraphModule) -> bool:
    return any(_is_mutable(node) for node in gm.graph.nodes)


def _is_mutable(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def mutated_inputs(gm: GraphModule, example_inputs: Sequence[Any]) -> list[int]:
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
                raise RefusedError(
                    "an output is a view of an input that the graph changes in place"
                )
    mine = example_inputs[index].untyped_storage().data_ptr()
    for other, example in enumerate(example_inputs):
        if other == index or not isinstance(example, Tensor) or not mine:
            continue
        if example.untyped_storage().data_ptr() == mine:
            raise RefusedError("two inputs share memory and the graph changes one of them in place")
