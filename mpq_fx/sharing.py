"""Sharing: the Work of a tune whose units several processes measure, and a checkpoint keeps

Each process measures its share of the units of a stage and all are given what all found, number by
number: nothing is summed on the way, so that a table is the same for any number of processes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from mpq_fx.checkpoint import Journal
from mpq_fx.facts import Identity
from mpq_fx.passes.analyze.work import Found, Measure, Work
from mpq_fx.processes import Processes

log = logging.getLogger("mpq_fx")
ROUNDS = 8  # exchanges of a stage that is kept: a kill loses what was measured since the last


class Sharing(Work):
    """The error table of one graph.  The first process holds the journal, where there is one."""

    def __init__(self, processes: Processes, journal: Journal | None, graph: int) -> None:
        self.size = processes.size
        self._processes, self._journal, self._graph = processes, journal, graph
        self._resumed = 0

    def begin(self, identity: Callable[[], Identity]) -> None:
        """ProcessError where another process tunes something else, CheckpointError where the
        journal is of something else.
        """
        if self.size == 1 and self._journal is None:
            return
        mine = identity()
        self._processes.agree(mine)
        if self._journal is not None:
            self._journal.claim(self._graph, mine)

    def known(self, stage: str) -> frozenset[str]:
        if self._journal is None:
            return frozenset()
        return self._journal.known(self._graph, stage)

    def collect(self, stage: str, costs: Mapping[str, float], measure: Measure) -> dict[str, Found]:
        kept = self._kept(stage, [*costs]), ROUNDS if self._journal is not None else 1
        known, rounds = self._processes.exchange(f"known of {stage}", kept)[0]
        missing = {name: cost for name, cost in costs.items() if name not in known}
        found = {**known, **self._measured(stage, missing, measure, rounds)}
        return {name: found[name] for name in costs if name in found}

    def agreed(self, is_so: bool) -> bool:
        return self._processes.exchange("agreed", is_so)[0]

    def facts(self) -> dict[str, Any]:
        facts = {"processes": self.size} if self.size > 1 else {}
        return {**facts, **({"resumed": self._resumed} if self._resumed else {})}

    def finish(self) -> None:
        self._processes.rest()

    def _kept(self, stage: str, names: Sequence[str]) -> dict[str, Found]:
        """What the journal has of a stage."""
        if self._journal is None:
            return {}
        known = self._journal.known(self._graph, stage)
        found = {name: self._read(stage, name) for name in names if name in known}
        self._resumed += len(found)
        if found:
            log.info("%s: %d of %d are in the checkpoint", stage, len(found), len(names))
        return found

    def _read(self, stage: str, name: str) -> Found:
        assert self._journal is not None
        facts, tensors = self._journal.read(self._graph, stage, name)
        return Found(tuple(tensors["powers"].tolist()), tensors.get("rows"), facts["seconds"])

    def _measured(
        self, stage: str, costs: Mapping[str, float], measure: Measure, rounds: int
    ) -> dict[str, Found]:
        """What all processes find of the units of a stage, a part of them in each round."""
        parts = shares(costs, self.size)
        mine, most = parts[self._processes.rank], max(map(len, parts))
        step = max(1, math.ceil(most / rounds))
        rounds = math.ceil(most / step)
        units = iter(measure(mine)) if mine else iter(())
        found: dict[str, Found] = {}
        for k in range(rounds):
            new = dict[str, Found]()
            for name, unit in units:
                self._keep(stage, name, unit)
                new[name] = unit
                if len(new) == step and k < rounds - 1:
                    break
            given = self._processes.exchange(f"{stage}, part {k}", new)
            for rank, theirs in enumerate(given):
                found |= theirs
                if rank != self._processes.rank:
                    for name, unit in theirs.items():
                        self._keep(stage, name, unit)
        return found

    def _keep(self, stage: str, name: str, unit: Found) -> None:
        if self._journal is None:
            return
        powers = torch.tensor(unit.powers, dtype=torch.float64)
        rows = {} if unit.rows is None else {"rows": unit.rows.contiguous()}
        address = self._graph, stage, name
        self._journal.append(address, {"seconds": unit.seconds}, {"powers": powers, **rows})


def shares(costs: Mapping[str, float], size: int) -> list[list[str]]:
    """Parts of about one cost, each in the order of `costs`.

    The most expensive unit goes first, each to the part that costs least so far (Graham 1969).
    """
    owners, loads = dict[str, int](), [0.0] * size
    for name in sorted(costs, key=lambda name: -costs[name]):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += costs[name]
    return [[name for name in costs if owners[name] == k] for k in range(size)]
