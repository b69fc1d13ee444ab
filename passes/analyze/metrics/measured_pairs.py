"""pair[u, c; v, d] = noise(u in c and v in d) − noise(u in c) − noise(v in d), every pair measured

The forward variant of CLADO (arXiv 2307.05657) in noise powers.  The walk of a single goes on as
the prefix of all pairs that begin with it, so a pair costs a suffix: with U units of K choices
about K² U² / 6 forward passes in all.  `block_pairs` measures pairs within a block and with the
next one only.  Terms may be negative, where errors cancel; the solver takes them as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from mpq_fx.facts import Choice, Table
from mpq_fx.passes.analyze.metric import IsWanted, Key, Record, Single, Task, Unit, averaged, begun
from mpq_fx.passes.analyze.metrics.interlayer_hessian import (
    Pair,
    relative_difference,
    rows_of,
)
from mpq_fx.passes.analyze.replay import Env

IsNear = Callable[[Unit, Unit], bool]


def measured_pairs(task: Task) -> Table:
    """Singles and all pairs."""
    return _pairs("measured_pairs", task, lambda u, v: True)


def block_pairs(task: Task) -> Table:
    """Singles, and pairs of units in the same block of layers or in two that follow each other."""
    return _pairs("block_pairs", task, _neighbors(task))


def passes_of_blocks(task: Task) -> float:
    """Forward passes of one call of `block_pairs`."""
    return _passes(task, _neighbors(task))


def projected_pairs(task: Task) -> Table:
    """`measured_pairs` with its matrix projected on those without negative eigenvalues, as CLADO's
    convex solver needs it: no plan is predicted to gain from an error.
    """
    table = measured_pairs(task)
    return replace(projected(task, table), metric="projected_pairs")


def _neighbors(task: Task) -> IsNear:
    order = list(dict.fromkeys(block_of(unit) for unit in task.units))
    position = {unit: order.index(block_of(unit)) for unit in task.units}
    return lambda u, v: abs(position[u] - position[v]) <= 1


def block_of(unit: Unit) -> str:
    """ "encoder.layer.3.attention.query" -> "encoder.layer.3": the path up to its first number"""
    found = re.match(r"(.*?\d+)(\.|$)", unit[0])
    return found[1] if found else unit[0].partition(".")[0]


def projected(task: Task, table: Table) -> Table:
    """The nearest table whose quadratic form in the choices has no negative eigenvalue.

    G[(u, c), (u, c)] = noise(u in c), G[(u, c), (v, d)] = pair / 2; G <- V max(Λ, 0) Vᵀ.
    """
    keys = [(unit, choice.name) for unit, choice in task.changes(lambda unit: True)]
    position = {(unit[0], name): k for k, (unit, name) in enumerate(keys)}
    gram = torch.zeros(len(keys), len(keys), dtype=torch.float64)
    for k, (unit, name) in enumerate(keys):
        gram[k, k] = sum(table.values[site, name] for site in unit)
    for (u, c, v, d), pair in table.pairs.items():
        i, j = position[u, c], position[v, d]
        gram[i, j] = gram[j, i] = pair / 2
    levels, vectors = torch.linalg.eigh(gram)
    kept = vectors @ torch.diag(levels.clamp_min(0.0)) @ vectors.T
    shares = {
        (site, name): float(kept[k, k]) / len(unit)
        for k, (unit, name) in enumerate(keys)
        for site in unit
    }
    pairs = {
        (keys[i][0][0], keys[i][1], keys[j][0][0], keys[j][1]): 2 * float(kept[i, j])
        for i in range(len(keys))
        for j in range(i + 1, len(keys))
        if keys[i][0] != keys[j][0] and kept[i, j] != 0.0
    }
    return replace(table, values={**table.values, **shares}, pairs=pairs)


def _pairs(name: str, task: Task, is_near: IsNear) -> Table:
    found: dict[Pair, list[float]] = {}
    seconds = _seconds_of(task, is_near)

    def each(record: Record, is_wanted: IsWanted) -> Iterator[Single]:
        reference, joint = task.replay.run(record, {}), list[float]()
        for (unit, choice), is_alone, outputs in _doubles(task, record, is_wanted, is_near):
            error = relative_difference(outputs, reference, task.excluded)
            power = float(error.square().sum())
            if is_alone:
                yield Single(unit, choice, power, torch.tensor(joint, dtype=torch.float64))
                joint.clear()
            else:
                joint.append(power)

    def keep(given: Sequence[Single]) -> None:
        alone = {single.key: single.power for single in given}
        for (u, c), row in rows_of(given).items():
            for (v, d), power in zip(seconds[u], row.tolist(), strict=True):
                if (v, d) in alone:
                    found.setdefault((u, c, v, d), []).append(power - alone[u, c] - alone[v, d])

    table = averaged(name, task, each, forward_passes=_passes(task, is_near), keep=keep)
    return replace(table, pairs={pair: sum(seen) / len(seen) for pair, seen in found.items()})


def _seconds_of(task: Task, is_near: IsNear) -> dict[str, list[Key]]:
    """unit -> the singles that `_doubles` pairs its own with, in that order."""
    left = set(task.units)
    walked = (begun(task, node, left) for node in task.replay.gm.graph.nodes)
    order = [unit for unit in walked if unit is not None]
    return {
        unit[0]: [
            (later[0], choice.name)
            for later in order[k + 1 :]
            if is_near(unit, later)
            for choice in task.options[later[0]][1:]
        ]
        for k, unit in enumerate(order)
    }


def _passes(task: Task, is_near: IsNear) -> float:
    """A suffix is half of a pass, one that begins with a later unit a third."""
    sizes = [(unit, len(task.options[unit[0]]) - 1) for unit in task.units]
    pairs = (n * m for k, (u, n) in enumerate(sizes) for v, m in sizes[k + 1 :] if is_near(u, v))
    return 1 + task.count / 2 + sum(pairs) / 3


def _doubles(
    task: Task, record: Record, is_wanted: IsWanted, is_near: IsNear
) -> Iterator[tuple[tuple[Unit, Choice], bool, list[Any]]]:
    """((unit, choice), alone or with one more, outputs); a single comes behind its pairs."""
    replay, nodes = task.replay, list(task.replay.gm.graph.nodes)
    env, left = replay.start(record), set(task.units)
    for at, node in enumerate(nodes):
        if node.op == "output":
            return
        unit = begun(task, node, left)
        if unit is not None and is_wanted(unit):
            near = {other for other in left if is_near(unit, other)}
            for choice in task.options[unit[0]][1:]:
                yield from _seconds(task, dict(env), nodes[at:], (unit, choice), near)
            replay.forget(unit)
        replay.step(env, node, {})


def _seconds(
    task: Task, env: Env, nodes: Sequence[Node], first: tuple[Unit, Choice], near: set[Unit]
) -> Iterator[tuple[tuple[Unit, Choice], bool, list[Any]]]:
    """Walk on with one unit changed; from each later one of `near`, finish with both changed."""
    changed = dict.fromkeys(*first)
    left = set(near)
    for at, node in enumerate(nodes):
        if node.op == "output":
            yield first, True, task.replay.finish(env, nodes[at:], changed)
            return
        if unit := begun(task, node, left):
            for choice in task.options[unit[0]][1:]:
                both = {**changed, **dict.fromkeys(unit, choice)}
                yield first, False, task.replay.finish(dict(env), nodes[at:], both)
        task.replay.step(env, node, changed)
