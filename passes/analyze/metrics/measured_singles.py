"""noise[u, c] = error(graph with unit u in choice c)²: every single measured by replay."""

from __future__ import annotations

from collections.abc import Iterator

from mpq_fx.facts import Table
from mpq_fx.passes.analyze.metric import IsWanted, Record, Single, Task, averaged, singles
from mpq_fx.passes.analyze.replay import output_error


def measured_singles(task: Task) -> Table:
    """Error of each (unit, choice) alone, all else float, squared and averaged over the records.

    Sites of a tie change together, as they will in every plan.
    """

    def each(record: Record, is_wanted: IsWanted) -> Iterator[Single]:
        reference = task.replay.run(record, {})
        for unit, choice, outputs in singles(task, record, is_wanted):
            yield Single(unit, choice, output_error(outputs, reference, task.excluded) ** 2)

    return averaged("measured_singles", task, each, forward_passes=task.suffixes)
