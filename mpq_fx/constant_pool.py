"""constant of one graph  ->  the same tensor in every graph that computes it from the same weights

Prefill and decode are graphs of their own, as are the plans that race, and each packs the weights
that it reads.  A constant is known by its recipe: the calls, and the very parameters that they
start from.  Who has one holds it; the pool only knows it as long as somebody does.

Each graph refreshes what it reads by its own watch on the weights, and notes which constants it has
written: an edit that is taken back before another graph is called leaves that graph's watch nothing
to see, and yet what both read is another.  A constant that is older than the weights is brought up
to date when a graph joins in.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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


@dataclass
class Writes:
    """When constants got other values, as numbers in the order of the writes."""

    last: int = 0
    of: dict[int, int] = field(default_factory=dict)  # id of a constant -> its last write


POOL: dict[Key, Entry] = {}
WRITES = Writes()
LOCK = threading.RLock()


def write(constant: Tensor, value: Tensor) -> bool:
    """constant = value, in place; did that change anything, as far as can be told?"""
    if not constant.is_mkldnn and torch.equal(constant, value):
        return False
    constant.copy_(value)
    return True


def wrote(constants: Sequence[Tensor], seen: int) -> int:
    """Note that these have other values; up to which write the one who wrote knows them all, if it
    did so up to `seen`.
    """
    with LOCK:
        if not constants:
            return seen
        is_next = WRITES.last == seen
        WRITES.last += 1
        WRITES.of |= dict.fromkeys(map(id, constants), WRITES.last)
        return WRITES.last if is_next else seen


def was_written(constant: Tensor, seen: int) -> bool:
    """By any graph, after the write `seen`?"""
    return WRITES.of.get(id(constant), 0) > seen


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
            if write(kept, mine):
                wrote([kept], WRITES.last)
            setattr(folded.gm, recipe.name, kept)


def _forget_dead() -> None:
    for key in [key for key, entry in POOL.items() if entry.constant() is None]:
        del POOL[key]
    known = {id(entry.constant()) for entry in POOL.values()}
    for dead in WRITES.of.keys() - known:
        del WRITES.of[dead]


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
            found.append((str(tensor.dtype), tuple(tensor.shape), _digest(tensor)))
        else:
            args = map_arg((node.args, dict(node.kwargs)), places.__getitem__)
            found.append((str(node.target), repr(args)))
    return tuple(map(repr, found))


def _digest(tensor: Tensor) -> str:
    """Of its bytes, in the order of its elements."""
    dense = tensor.detach().cpu().contiguous().flatten()
    return hashlib.sha256(dense.view(torch.uint8).numpy().tobytes()).hexdigest()
