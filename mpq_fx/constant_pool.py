"""constant of one graph  ->  the same tensor in every graph that computes it from the same weights

Prefill and decode are graphs of their own, as are the plans that race, and each packs the weights
that it reads.  A constant is known by its recipe: the calls, and the very parameters that they
start from.  Who has one holds it; the pool only knows it as long as somebody does.

Each graph refreshes what it reads by its own watch on the weights, and writes what the others would
write.  A constant that is older than the weights is brought up to date when a graph joins in: the
ones before find the edit at their next call, as they would have.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, map_arg

from mpq_fx.passes.lower.constants import Folded, Recipe

Key = tuple[Any, ...]


@dataclass(frozen=True)
class Entry:
    """A constant, and the parameters that it was computed from: an id may be another's later."""

    constant: weakref.ref[Tensor]
    parameters: tuple[weakref.ref[Tensor], ...]


POOL: dict[Key, Entry] = {}
LOCK = threading.Lock()


def share(folded: Folded, source: GraphModule, parameters: Mapping[str, Tensor]) -> None:
    """Put what other graphs own in the place of equal constants; know the rest from now on."""
    with LOCK, torch.inference_mode(False), torch.no_grad():
        _forget_dead()
        for recipe in folded.recipes:
            mine: Tensor = getattr(folded.gm, recipe.name)
            key = _key(recipe, source, parameters)
            read = [parameters[name] for name in recipe.parameters]
            if mine.is_mkldnn or mine.requires_grad:
                continue  # of an opaque layout: there is no telling whether two are equal
            kept = _alive(POOL.get(key), read)
            if kept is None or not _is_like(kept, mine):
                refs = tuple(weakref.ref(parameter) for parameter in read)
                POOL[key] = Entry(weakref.ref(mine), refs)
                continue
            if not torch.equal(kept, mine):
                kept.copy_(mine)
            setattr(folded.gm, recipe.name, kept)


def _forget_dead() -> None:
    for key in [key for key, entry in POOL.items() if entry.constant() is None]:
        del POOL[key]


def _alive(entry: Entry | None, parameters: list[Tensor]) -> Tensor | None:
    """The constant, if it is of these very parameters."""
    if entry is None or any(
        ref() is not mine for ref, mine in zip(entry.parameters, parameters, strict=True)
    ):
        return None
    return entry.constant()


def _is_like(kept: Tensor, mine: Tensor) -> bool:
    """Can one stand for the other, in the same memory layout?"""
    return (
        kept.dtype == mine.dtype
        and kept.device == mine.device
        and kept.shape == mine.shape
        and kept.stride() == mine.stride()
    )


def _key(recipe: Recipe, source: GraphModule, parameters: Mapping[str, Tensor]) -> Key:
    """What is computed from which parameters: the calls in order, by the places of their inputs."""
    places = {node: f"%{k}" for k, node in enumerate(recipe.nodes)}
    found: list[Any] = []
    for node in recipe.nodes:
        if node.op == "placeholder":
            found.append(id(parameters[node.name]))
        elif node.op == "get_attr":
            tensor: Tensor = getattr(source, str(node.target))
            found.append((str(tensor.dtype), tuple(tensor.shape), tensor.tolist()))
        else:
            args = map_arg((node.args, dict(node.kwargs)), places.__getitem__)
            found.append((str(node.target), repr(args)))
    return tuple(map(repr, found))
