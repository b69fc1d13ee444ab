"""metric(Task) -> Table: how much each choice of each unit hurts; METRICS in mpq_fx.passes lists
them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from statistics import fmean, median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from mpq_fx.errors import CalibrationError
from mpq_fx.facts import Choice, Table
from mpq_fx.passes.analyze.replay import Replayer
from mpq_fx.passes.analyze.work import Found, Work

Record = Sequence[Any]  # the inputs of one call
Unit = tuple[str, ...]  # sites that change together
Kind = tuple[str, ...]
Key = tuple[str, str]  # site, name of a choice
IsWanted = Callable[[Unit], bool]  # is there time for a unit?
OutputLoss = Callable[[Sequence[Any]], Tensor]  # outputs of a call -> the user's loss of them


@dataclass(frozen=True)
class Task:
    """What a metric measures: how much each option hurts, on some recorded calls."""

    replay: Replayer  # the float graph with its weights
    options: Mapping[str, tuple[Choice, ...]]  # of each site; the first is its own precision
    records: Sequence[Record]  # none of them is used for the reported error
    ties: Sequence[Unit] = ()  # sites that share a choice in every plan
    excluded: frozenset[int] = frozenset()  # outputs that are caches, and no part of the error
    deadline: float = float("inf")  # a time.monotonic(); past it a metric stops early and says so
    losses: Sequence[OutputLoss] = ()  # of each record, where the user gave a loss
    work: Work = field(default_factory=Work)  # who measures which units, and what is kept of it

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """The sites that change together: each tie, and every other site by itself."""
        tied = {site: tie for tie in self.ties for site in tie}
        return tuple(dict.fromkeys(tied.get(site, (site,)) for site in self.options))

    @cached_property
    def kinds(self) -> Mapping[Unit, Kind]:
        """What a unit has in common with its like: the op, and what it may run in."""
        ops = {site.name: site.op for site in self.replay.sites.values()}
        return {u: (ops[u[0]], *(choice.name for choice in self.options[u[0]])) for u in self.units}

    @cached_property
    def unit_of(self) -> Mapping[str, Unit]:
        """site -> the unit it belongs to"""
        return {site: unit for unit in self.units for site in unit}

    @property
    def count(self) -> int:
        """How many singles there are: every choice of every unit but its own precision."""
        return sum(len(self.options[unit[0]]) - 1 for unit in self.units)

    @property
    def costs(self) -> Mapping[Unit, int]:
        """About how long the singles of a unit take: a suffix of the graph for each choice."""
        last = len(self.units)
        return {u: (len(self.options[u[0]]) - 1) * (last - k) for k, u in enumerate(self.units)}

    @property
    def suffixes(self) -> float:
        """Forward passes of one call and of all its singles; a suffix counts as half of one."""
        return 1 + self.count / 2

    def changes(self, is_wanted: IsWanted) -> Iterator[tuple[Unit, Choice]]:
        """Every single that there is time for."""
        for unit in self.units:
            if is_wanted(unit):
                yield from ((unit, choice) for choice in self.options[unit[0]][1:])


Metric = Callable[[Task], Table]


@dataclass(frozen=True)
class LossMetric:
    """A metric that asks the user's loss: only `tune(loss=...)` can fill `Task.losses`.

    `measure` gives rises of the loss, which may be negative, and the noise powers of the same
    singles: a loss does not tell how large an error is, and a tolerance is about that.
    """

    measure: Callable[[Task], tuple[Table, Table]]

    def __call__(self, task: Task) -> Table:
        return self.measure(task)[0]


class Single(NamedTuple):
    """One unit alone in one choice, in one recorded call."""

    unit: Unit
    choice: Choice
    power: float  # noise power
    row: Tensor | None = None  # what else a metric makes its table from; as long for every choice

    @property
    def key(self) -> Key:
        """A single goes by the first site of its unit."""
        return self.unit[0], self.choice.name


# What a metric says of one recorded call: all choices of a unit behind each other.
Each = Callable[[Record, IsWanted], Iterator[Single]]
Keep = Callable[[Sequence[Single]], None]


def averaged(
    metric: str, task: Task, each: Each, *, forward_passes: float, keep: Keep | None = None
) -> Table:
    """The table of a metric that tells how much each single hurts in one recorded call.

    Means and ranges over the calls, zeros for float.  A further call is begun only if it should end
    by the deadline.  In the first one a unit for which there is no time is left out, see `on_pace`,
    and gets the median of its like; later calls measure what the first one did.  Sites of a tie
    share the noise evenly.  `forward_passes` is what one call costs; `keep` is shown the singles of
    each call.  `each` may be asked for some of the units only: see `Work`.
    """
    begin, seconds = time.monotonic(), list[Mapping[str, float]]()
    powers: dict[Key, list[float]] = {}
    costs = {unit[0]: cost for unit, cost in task.costs.items() if cost}
    for k, record in enumerate(task.records):
        stage = f"{metric}, call {k}"
        if k and not task.work.agreed(_is_time(task, stage, seconds)):
            break
        deadline = float("inf") if k else task.deadline
        measure = partial(_measured, task, each, record, deadline)
        found = task.work.collect(stage, costs, measure)
        costs = {name: costs[name] for name in found}
        seconds.append({name: unit.seconds for name, unit in found.items()})
        given = _singles_of(task, found)
        for unit, choice, power, _ in given:
            _refuse_infinite(metric, task, unit, choice, power)
            for site in unit:
                powers.setdefault((site, choice.name), []).append(power / len(unit))
        if keep is not None:
            keep(given)
    return _table(metric, task, powers, len(seconds), begin, forward_passes)


def _refuse_infinite(metric: str, task: Task, unit: Unit, choice: Choice, power: float) -> None:
    if not math.isfinite(power):
        site = next(site for site in task.replay.sites.values() if site.name == unit[0])
        raise CalibrationError(
            f"{metric} finds {power} for a {site.op} in {choice.name}: an output or a gradient of "
            "a recorded call is not finite",
            at=" ".join(filter(None, (site.path or site.name, site.source))),
            fix='leave such calls out, or sensitivity="measured", which asks no gradient',
        )


def _is_time(task: Task, stage: str, seconds: Sequence[Mapping[str, float]]) -> bool:
    """Should a call end by the deadline, if units take as long as they did in the calls before?"""
    left = seconds[0].keys() - task.work.known(stage)
    needed = sum(fmean(call[name] for call in seconds) for name in left) / task.work.size
    return not left or time.monotonic() + needed <= task.deadline


def _measured(
    task: Task, each: Each, record: Record, deadline: float, names: Sequence[str]
) -> Iterator[tuple[str, Found]]:
    """What each unit of `names` gave, when its last choice is measured."""
    mine, now = frozenset(names), time.monotonic()
    kinds = {unit: kind for unit, kind in task.kinds.items() if unit[0] in mine}
    has_time, done = on_pace(kinds, now, deadline), list[Single]()
    for single in each(record, lambda unit: unit[0] in mine and has_time(unit)):
        done.append(single)
        assert single.unit == done[0].unit, "the choices of a unit stand behind each other"
        if len(done) < len(task.options[single.unit[0]]) - 1:
            continue
        rows = [s.row.detach().cpu() for s in done if s.row is not None]
        before, now = now, time.monotonic()
        powers = tuple(float(s.power) for s in done)
        yield single.unit[0], Found(powers, torch.stack(rows) if rows else None, now - before)
        done.clear()


def _singles_of(task: Task, found: Mapping[str, Found]) -> list[Single]:
    return [
        Single(task.unit_of[name], choice, power, None if unit.rows is None else unit.rows[k])
        for name, unit in found.items()
        for k, (choice, power) in enumerate(zip(task.options[name][1:], unit.powers, strict=True))
    ]


def singles(
    task: Task, record: Record, is_wanted: Callable[[Unit], bool]
) -> Iterator[tuple[Unit, Choice, list[Any]]]:
    """(unit, choice, outputs with this unit alone in this choice) in one walk along the graph: the
    unchanged prefix is computed once, a single costs only the suffix.
    """
    replay = task.replay
    nodes = list(replay.gm.graph.nodes)
    env, left = replay.start(record), set(task.units)
    for at, node in enumerate(nodes):
        if node.op == "output":
            return
        unit = begun(task, node, left)
        if unit is not None and is_wanted(unit):
            for choice in task.options[unit[0]][1:]:
                changed = dict.fromkeys(unit, choice)
                yield unit, choice, replay.finish(dict(env), nodes[at:], changed)
            replay.forget(unit)
        replay.step(env, node, {})


def begun(task: Task, node: Node, left: set[Unit]) -> Unit | None:
    """The unit of `left` whose first site a node is; it is taken out of `left`."""
    site = task.replay.sites.get(node.name)
    unit = task.unit_of.get(site.name) if site else None
    if unit is None or unit not in left:
        return None
    left.remove(unit)
    return unit


def on_pace(kinds: Mapping[Unit, Kind], begin: float, deadline: float) -> IsWanted:
    """Is there time for a unit?  For the first of each kind always; for the k-th of n while no more
    than k / n of the time is used, so that what is left out is spread over the whole graph.
    """
    share, known = (deadline - begin) / max(1, len(kinds)), set()
    position = {unit: k + 1 for k, unit in enumerate(kinds)}

    def is_wanted(unit: Unit) -> bool:
        is_new = kinds[unit] not in known
        known.add(kinds[unit])
        return is_new or time.monotonic() <= begin + share * position[unit]

    return is_wanted


def _table(
    metric: str,
    task: Task,
    powers: Mapping[Key, Sequence[float]],
    used: int,
    begin: float,
    forward_passes: float,
) -> Table:
    means = {key: sum(seen) / len(seen) for key, seen in powers.items()}
    spread = {key: max(seen) - min(seen) for key, seen in powers.items()}
    guesses = _estimated(task, means)
    return Table(
        metric,
        "noise_power",
        filled(task, means),
        spread={**_floats(task), **spread},
        provenance={
            "records": used,
            "of": len(task.records),
            "seconds": round(time.monotonic() - begin, 3),
            "forward_passes": used * forward_passes,
            "estimated": sorted({site for site, _ in guesses}),
            **task.work.facts(),
        },
    )


def filled(task: Task, means: Mapping[Key, float]) -> dict[Key, float]:
    """Zeros for float, and guesses for what was not measured."""
    return {**_floats(task), **_estimated(task, means), **means}


def _floats(task: Task) -> dict[Key, float]:
    return {(site, kept[0].name): 0.0 for site, kept in task.options.items()}


def _estimated(task: Task, means: Mapping[Key, float]) -> dict[Key, float]:
    """For each unit that was not measured the median, per choice, of those of its kind."""
    known: dict[tuple[Kind, str], list[float]] = {}
    for (site, choice), power in means.items():
        unit = task.unit_of[site]
        known.setdefault((task.kinds[unit], choice), []).append(power * len(unit))
    return {
        (site, choice.name): median(known[kind, choice.name]) / len(unit)
        for unit, kind in task.kinds.items()
        for choice in task.options[unit[0]][1:]
        for site in unit
        if (site, choice.name) not in means
    }
