"""One captured graph with the parameters it is called with: calls seen, plan, constants, freshness.

Dynamo compiles code once and calls it with many weights, so nothing is baked into a graph: a
binding
is found by the identities of the parameters that a call passes in.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from mpq_fx.constant_pool import WRITES, was_written, write, wrote
from mpq_fx.facts import Plan
from mpq_fx.passes.lower.constants import Recipe, evaluate
from mpq_fx.watch import Stamp, Watch, stamp

Sizes = tuple[tuple[int, ...], ...]  # of the tensors of a call, parameters aside

RECORD_BYTES = 1 << 28  # bound on the inputs kept for calibration


@dataclass(frozen=True)
class Installed:
    """What a binding runs after its plan is solved: a compiled graph over owned constants."""

    run: Callable[..., Any]  # of the live arguments
    live: tuple[int, ...]  # positions, among all arguments, that `run` takes
    passed: tuple[Tensor, ...]  # small constants, passed behind those
    constants: GraphModule  # owns the buffers that `run` reads
    live_names: tuple[str, ...]  # placeholders at those positions
    derived: tuple[Callable[[], None], ...]  # to be redone after a constant was refreshed
    source: GraphModule  # the graph the recipes compute in
    recipes: tuple[Recipe, ...]
    stamps: Mapping[str, Stamp]  # of the parameters, before the recipes read them
    target: str  # that it was compiled for
    accepts: Callable[[Sequence[Any]], bool] = lambda args: True  # sizes this compilation is for


@dataclass
class Binding:
    """The mutable state of one (graph, parameters); `lock` is held while it changes."""

    names: tuple[str, ...]  # placeholders that hold parameters
    parameters: tuple[weakref.ref[Tensor], ...]
    site_names: Mapping[str, str] = field(default_factory=dict)  # in the graph -> in the model
    records: list[tuple[Any, ...]] = field(default_factory=list)
    losses: tuple[Callable[..., Any], ...] = ()  # of the outputs of each record, in `tune`
    calls: int = 0
    shapes: Counter[Sizes] = field(default_factory=Counter)  # calls of each, repeated ones too
    plan: Plan | None = None
    reason: str = "observing"  # why this runs in float; "" once installed
    installed: Installed | None = None
    trial: Callable[..., Any] | None = None  # a plan under test in `tune`
    watch: Watch | None = None
    watched: tuple[str, ...] = ()
    positions: tuple[int, ...] = ()  # of the watched among the parameters
    released: bool = False
    seen: int = 0  # write of shared constants up to which those of this graph are known
    orphaned: bool = False  # a parameter died, and its id may be another tensor's by now
    order: int = field(default_factory=itertools.count().__next__)  # of first calls
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    def adopt(self, parameters: Sequence[Tensor]) -> None:
        """Be the binding of these tensors, as long as they live."""
        me = weakref.ref(self)

        def orphan(dead: weakref.ref[Tensor]) -> None:
            if (binding := me()) is None:
                return
            binding.orphaned = True
            # One parameter that is assigned another tensor is the same model still.
            if len(binding.parameters) > 1 and not binding.values():
                binding.let_go()

        self.parameters = tuple(weakref.ref(p, orphan) for p in parameters)
        self.orphaned = False

    def let_go(self) -> None:
        """The model is gone: nobody calls this again, and Dynamo keeps code longer than models."""
        self.installed, self.watch, self.reason = None, None, "its model is gone"
        self.records, self.losses = [], ()

    def values(self) -> dict[str, Tensor]:
        """{placeholder: parameter}; a parameter that died makes its entry missing."""
        alive = zip(self.names, (ref() for ref in self.parameters), strict=True)
        return {name: p for name, p in alive if p is not None}

    def install(self, installed: Installed, plan: Plan) -> None:
        """Switch to a compiled plan at once; the calibration inputs are let go."""
        self.watched = tuple(sorted({p for r in installed.recipes for p in r.parameters}))
        self.positions = tuple(map(self.names.index, self.watched))
        if not self.released:  # else there is nothing left to look at
            self._begin_to_watch(installed)
        self.installed, self.plan, self.reason = installed, plan, ""
        self.records, self.losses = [], ()

    def _begin_to_watch(self, installed: Installed) -> None:
        """Know the weights as they are; what another thread edited while the plan was solved is
        computed again.
        """
        values, last, read = self.values(), WRITES.last, installed.stamps
        self.watch = Watch([values[name] for name in self.watched])
        edited = [name for name in self.watched if read[name] != stamp(values[name])]
        self.seen = wrote(renewed(installed, values, edited), last)

    def keep_float(self, reason: str, plan: Plan | None = None) -> None:
        self.installed, self.reason, self.records = None, reason, []
        self.plan, self.losses = plan, ()

    def freshen(self, parameters: Sequence[Tensor]) -> list[str]:
        """Recompute the constants of weights that changed; the cheap check of every call."""
        if self.watch is None or self.released:
            return []
        tensors = [parameters[k] for k in self.positions]
        changed, last = self.watch.changed(tensors), WRITES.last
        if last != self.seen:
            changed = self._with_written(changed)
        if changed:
            with self.lock:
                values = dict(zip(self.names, parameters, strict=True))
                seen = self.watch.seen(tensors, changed)
                self.update(values, [self.watched[k] for k in changed], last)
                self.watch.accept(seen)
        elif last != self.seen:
            self.seen = last
        return [self.watched[k] for k in changed]

    def _with_written(self, changed: list[int]) -> list[int]:
        """And the weights of constants that another graph has written, see constant_pool."""
        assert self.installed is not None
        owned = self.installed.constants
        found = {
            self.watched.index(parameter)
            for recipe in self.installed.recipes
            if was_written(getattr(owned, recipe.name), self.seen)
            for parameter in recipe.parameters
        }
        return sorted(found | set(changed))

    def refresh(self) -> list[str]:
        """Look at every element of every weight now; returns the placeholders that had changed."""
        if self.watch is None or self.released:
            return []
        values = self.values()
        tensors = [values[name] for name in self.watched]
        with self.lock:
            last = WRITES.last
            edited = self._with_written(self.watch.edited(tensors))
            seen = self.watch.seen(tensors, edited)
            self.update(values, [self.watched[k] for k in edited], last)
            self.watch.accept(seen)
        return [self.watched[k] for k in edited]

    def update(self, values: Mapping[str, Tensor], changed: Sequence[str], last: int) -> None:
        """Copy recomputed values into the constants that depend on `changed`, in place; they are
        then as after the write `last` of shared ones.
        """
        assert self.installed is not None
        self.seen = wrote(renewed(self.installed, values, changed), last)


def renewed(
    installed: Installed, values: Mapping[str, Tensor], changed: Sequence[str]
) -> list[Tensor]:
    """The constants that got other values."""
    touched = [r for r in installed.recipes if set(r.parameters) & set(changed)]
    fresh = evaluate(installed.source, touched, values)
    owned = installed.constants
    with torch.inference_mode(False), torch.no_grad():
        written = [getattr(owned, k) for k, x in fresh.items() if write(getattr(owned, k), x)]
        for redo in installed.derived if touched else ():
            redo()
    return written


def bind(names: Sequence[str], parameters: Sequence[Tensor], sites: Mapping[str, str]) -> Binding:
    binding = Binding(tuple(names), (), sites)
    binding.adopt(parameters)
    return binding


def sizes_of(record: Sequence[Any]) -> Sizes:
    return tuple(tuple(x.shape) for x in record if isinstance(x, Tensor))


def record_bytes(record: Sequence[Any]) -> int:
    return sum(x.numel() * x.element_size() for x in record if isinstance(x, Tensor))


def copied(x: Tensor) -> Tensor:
    """The same numbers at the same strides, which compiled code takes for granted: a clone of an
    expanded or a sliced tensor is dense.
    """
    if x.layout != torch.strided or torch.ops.aten.is_non_overlapping_and_dense(x) or not x.numel():
        return x.clone()
    spanned = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    return x.as_strided((spanned,), (1,)).clone().as_strided(x.shape, x.stride(), 0)


def fresh(record: Sequence[Any]) -> tuple[Any, ...]:
    """A record whose plain tensors are copies, for a run that may write to its inputs."""
    return tuple(
        copied(x) if isinstance(x, Tensor) and not isinstance(x, torch.nn.Parameter) else x
        for x in record
    )
