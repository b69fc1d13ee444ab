"""Which compiled graphs belong to a model: found by the identities of its parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from mpq_fx.binding import Binding
from mpq_fx.config import Config
from mpq_fx.errors import MpqError
from mpq_fx.facts import Plan, Row, Site
from mpq_fx.lifecycle import LIFECYCLES, Known, Lifecycle

ROOTS: Known[torch.nn.Module] = Known()  # models that a user handed over


def naming_root(binding: Binding, frame: torch.nn.Module | None) -> torch.nn.Module | None:
    """The model that names a binding's sites: one the user handed over, else the compiled
    frame's.
    """
    mine = {id(ref()) for ref in binding.parameters}
    for root in (*ROOTS, *([frame] if frame is not None else [])):
        if mine <= {id(t) for t in (*root.parameters(), *root.buffers())}:
            return root
    return None


def bindings_under(config: Config) -> list[Binding]:
    """Of every graph that was compiled with these options: other options ask for another plan."""
    same = [lifecycle for lifecycle in LIFECYCLES if lifecycle.config == config]
    return [b for lifecycle in same for b in list(lifecycle.bindings.values())]


def root_of(compiled: Any) -> torch.nn.Module:
    """The module behind what the user holds: a compiled wrapper, a module, or its bound forward."""
    for candidate in (
        getattr(compiled, "_orig_mod", None),
        compiled,
        getattr(compiled, "__self__", None),
        getattr(getattr(compiled, "_torchdynamo_orig_callable", None), "__self__", None),
    ):
        if isinstance(candidate, torch.nn.Module):
            return getattr(candidate, "_orig_mod", candidate)
    raise MpqError(
        f"{type(compiled).__name__} is not a compiled module",
        fix='model = torch.compile(model, backend="mpq")',
    )


def bindings_of(compiled: Any) -> list[tuple[Lifecycle, Binding]]:
    """Every (graph, binding) whose parameters all belong to the model, in order of first call."""
    root = root_of(compiled)
    owned = {id(t) for t in (*root.parameters(), *root.buffers())}
    found = [
        (lifecycle, binding)
        for lifecycle in LIFECYCLES
        for binding in list(lifecycle.bindings.values())
        if binding.parameters and all(id(ref()) in owned for ref in binding.parameters)
    ]
    return sorted(found, key=lambda pair: pair[1].order)


def site_names(sites: Sequence[Site], binding: Binding, root: torch.nn.Module) -> dict[str, str]:
    """{site in the graph: qualified name in the model}; a weight with two names keeps the first.

    A further weight of a module is named itself ("cell", "cell.weight_hh").  A site without a
    weight keeps its module path; names that would clash, as those of one weight do, get a number.
    """
    names: dict[int, str] = {}
    for name, tensor in root.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), name)
    values = binding.values()
    found, taken, owners = {}, set(), dict[str, str]()
    for site in sites:
        owner = names.get(id(values.get(site.weight or "")), "")
        wanted = owner.rpartition(".")[0] or owner.removesuffix(".weight") or site.name
        if owner and owners.setdefault(wanted, owner) != owner:
            wanted = owner
        unique = next(n for n in _numbered(wanted) if n not in taken)
        taken.add(unique)
        found[site.name] = unique
    return found


def entries(compiled: Any) -> list[tuple[str, Plan | None, str, tuple[Row, ...], str]]:
    """(label, plan or None, why it runs in float or "", rows where there is no plan, the target
    that it runs on if it was made for another) per plan.

    Graphs that share a plan (other shapes of one code, parts of one model) make one entry.
    """
    groups: dict[tuple[int, str], list[int]] = {}
    found = bindings_of(compiled)
    for k, (lifecycle, binding) in enumerate(found):
        key = id(binding.plan or binding), lifecycle.reason or binding.reason
        groups.setdefault(key, []).append(k)
    if not found and (reason := bypass(compiled)):
        return [("no graph", None, reason, (), "")]
    return [_entry(graphs, *found[graphs[0]], reason) for (_, reason), graphs in groups.items()]


def _entry(
    graphs: Sequence[int], lifecycle: Lifecycle, binding: Binding, reason: str
) -> tuple[str, Plan | None, str, tuple[Row, ...], str]:
    plan, installed, place = binding.plan, binding.installed, ""
    if plan is not None and installed is not None and installed.target != plan.target:
        place = installed.target
    return _label(graphs), plan, reason, _float_rows(lifecycle, binding, reason), place


def _label(graphs: Sequence[int]) -> str:
    return f"graph{'s' if len(graphs) > 1 else ''} {', '.join(map(str, graphs))}"


def _float_rows(lifecycle: Lifecycle, binding: Binding, reason: str) -> tuple[Row, ...]:
    """The sites of a graph without a plan: all in the user's precision, for one reason."""
    if binding.plan is not None:
        return ()
    return tuple(
        Row(
            replace(site, name=binding.site_names[site.name]),
            site.dtype,
            reason,
            weight_bytes=site.weight_numel * getattr(torch, site.dtype).itemsize,
        )
        for site in lifecycle.sites
    )


def bypass(compiled: Any) -> str:
    """Why calls of a compiled model may never have reached a backend, or "".

    wrapper.generate is the method of the model inside, which calls that model and not the wrapper.
    And Dynamo traces no frame of torch.nn itself, where model.compile() of a class there begins.
    """
    if isinstance(compiled, torch.nn.Module) and _begins_in_torch(compiled):
        return (
            f"Dynamo skips {type(compiled).__name__}.compile(), whose forward is torch.nn's own; "
            'type model = torch.compile(model, backend="mpq") instead'
        )
    model = getattr(compiled, "_orig_mod", None)
    if model is None or not callable(getattr(model, "generate", None)):
        return ""
    return (
        ".generate() of a torch.compile wrapper calls the uncompiled model; type "
        'model.compile(backend="mpq") instead, which compiles in place'
    )


def _begins_in_torch(model: torch.nn.Module) -> bool:
    is_torchs = type(model).forward.__module__.startswith("torch.nn.")
    return is_torchs and model._compiled_call_impl is not None


def totals(compiled: Any) -> dict[str, int]:
    """Parameters of the model, and how many of them some captured graph reads."""
    root = root_of(compiled)
    captured = {
        id(ref())
        for lifecycle, binding in bindings_of(compiled)
        if not lifecycle.reason
        for ref in binding.parameters
    }
    parameters = list(root.parameters())
    if not parameters:
        return {"parameters": 0, "captured": 0}
    return {
        "parameters": sum(p.numel() for p in parameters),
        "captured": sum(p.numel() for p in parameters if id(p) in captured),
    }


def _numbered(name: str) -> Iterator[str]:
    yield name
    count = 2
    while True:
        yield f"{name}#{count}"
        count += 1
