"""Which sizes a late compilation is valid for: the guards it added to Dynamo's symbolic shapes.

A plan is compiled after Dynamo has fixed its own guards, so whatever Inductor assumes about a
symbolic size from then on has to be checked here, once per new combination of sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import sympy
import torch
from torch.fx import GraphModule

from mpq_fx.graph import placeholders


class SizeGuard:
    """accepts(args): do the sizes of a call satisfy every assumption of the compilation?"""

    def __init__(self, symbols: Mapping[int, sympy.Symbol]) -> None:
        self.symbols = symbols
        self.conditions: list[sympy.Basic] = []
        self._known: dict[tuple[int, ...], bool] = {}

    def __call__(self, args: Sequence[Any]) -> bool:
        if not self.conditions:
            return True
        sizes = tuple(args[k] for k in self.symbols)
        if sizes not in self._known:
            values = dict(zip(self.symbols.values(), sizes, strict=True))
            self._known[sizes] = all(bool(c.xreplace(values)) for c in self.conditions)
        return self._known[sizes]


@contextmanager
def size_guard(gm: GraphModule) -> Iterator[SizeGuard]:
    """Collects what is assumed inside the block about the symbolic sizes among gm's inputs."""
    values = [node.meta.get("val") for node in placeholders(gm)]
    symbolic = {k: v.node for k, v in enumerate(values) if isinstance(v, torch.SymInt)}
    guard = SizeGuard({k: node.expr for k, node in symbolic.items() if node.expr.is_Symbol})
    env = next((node.shape_env for node in symbolic.values()), None)
    if env is None:
        yield guard
        return
    before, frozen = len(env.guards), env.frozen
    env.frozen = False  # else an assumption would be made without being recorded
    try:
        yield guard
    finally:
        guard.conditions = [g.expr for g in env.guards[before:]]
        env.frozen = frozen
