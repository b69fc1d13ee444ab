"""Who measures which units of a table: all of them here, unless a caller's Work shares them out

The caller of a metric may split the units over processes, and may keep what each of them gave; a
metric asks `collect` for the units of a stage (one recorded call) and cannot tell the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mpq_fx.facts import Identity


@dataclass(frozen=True)
class Found:
    """What one unit gave in one stage."""

    powers: tuple[float, ...]  # of each choice in turn
    rows: Tensor | None = None  # [choices, numbers], where a metric has more to tell than a power
    seconds: float = 0.0  # that it took to measure


# Names of units -> what each of them gave, in any order; a unit may be left out.
Measure = Callable[[Sequence[str]], Iterator[tuple[str, Found]]]


class Work:
    """Everything is measured in this process, and nothing is kept."""

    size = 1  # processes

    def begin(self, identity: Callable[[], Identity]) -> None:
        """A table begins; `identity` says what its numbers depend on."""

    def known(self, stage: str) -> AbstractSet[str]:
        """The units of a stage that need not be measured any more."""
        return frozenset()

    def collect(self, stage: str, costs: Mapping[str, float], measure: Measure) -> dict[str, Found]:
        """What each unit gave, in the order of `costs`: names with about how long they take."""
        found = dict(measure([*costs]))
        return {name: found[name] for name in costs if name in found}

    def agreed(self, is_so: bool) -> bool:
        """What hangs on a clock, as the first process sees it."""
        return is_so

    def facts(self) -> dict[str, Any]:
        """What the provenance of a table should tell."""
        return {}

    def finish(self) -> None:
        """The table is done."""
