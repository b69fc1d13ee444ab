"""Seconds per stage, against a budget; what was cut short is noted once, in the plan."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

# Called with the name of each stage that begins; `tune` shows it.
ANNOUNCE: ContextVar[Callable[[str], None]] = ContextVar("announce", default=lambda stage: None)


class Clock:
    """Stage timings of one optimization and the deadline they share."""

    def __init__(self, budget: float) -> None:
        self.begin = time.monotonic()
        self.budget = budget
        self.timings: dict[str, float] = {}
        self.notes: list[str] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        ANNOUNCE.get()(name)
        begin = time.monotonic()
        try:
            yield
        finally:
            spent = time.monotonic() - begin
            self.timings[name] = round(self.timings.get(name, 0.0) + spent, 3)

    def deadline(self, share: float) -> float:
        """The monotonic time by which `share` of the budget is spent."""
        return self.begin + share * self.budget

    def is_past(self, share: float = 1.0) -> bool:
        return time.monotonic() > self.deadline(share)

    def cut(self, what: str) -> None:
        self.note(f"time_budget of {self.budget:g} s: {what}")

    def note(self, what: str) -> None:
        """Something the plan has to tell."""
        self.notes.append(what)
