"""A process that holds one variant and answers requests for times.

Several runtimes in one process spoil each other's timings, because their idle thread pools spin;
so each variant gets a process of its own, and only one of them is asked at a time.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

CALLS = 3  # timed in each round, after one that is not
GRACE = 2.0  # seconds to end by itself, before a worker that still builds is ended
REASON = 300  # characters of an error that are kept


@dataclass(frozen=True)
class Ready:
    """A variant that is built: what to time, its error, and a word on what it does."""

    run: Callable[[], Any]
    error: float
    detail: str = ""


@dataclass(frozen=True)
class Started:
    """What a worker says once it is ready: why it is not ("" if it is), seconds, error, detail."""

    reason: str
    seconds: float = 0.0
    error: float = 0.0
    detail: str = ""


Job = Callable[[], Ready]


class Worker:
    """The parent's side: start, time, stop."""

    def __init__(self, job: Job) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._folder = tempfile.TemporaryDirectory()
        self._log = Path(self._folder.name) / "log"
        self._process = context.Process(target=serve, args=(theirs, job, str(self._log)))
        self._process.start()
        theirs.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.connection.close()  # which ends a worker that waits for requests
        self._process.join(GRACE)
        self._process.terminate()
        self._process.join()
        self._folder.cleanup()

    def start(self, limit: float) -> Started:
        """Wait until the variant is built; an error, a crash and a timeout are reasons."""
        if not self.connection.poll(limit):
            return Started(f"not ready after {limit:.0f} s")
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            return Started(self._death())

    def times(self) -> list[float]:
        """Milliseconds of the next calls; [] once the process died."""
        try:
            self.connection.send("go")
            return self.connection.recv()
        except (EOFError, OSError):
            return []

    def _death(self) -> str:
        self._process.join()
        lines = self._log.read_text(errors="replace").split("\n") if self._log.exists() else []
        last = next((line for line in reversed(lines) if line.strip()), "no message")
        return f"the process ended with code {self._process.exitcode}: {last[-REASON:]}"


def serve(connection: Connection, job: Job, log: str) -> None:
    """The worker's side: build, report, then answer each request with the times of some calls."""
    _redirect(log)
    begin = time.perf_counter()
    try:
        ready = job()
    except Exception as error:
        traceback.print_exc()
        connection.send(Started(reason_of(error)))
        return
    seconds = time.perf_counter() - begin
    connection.send(Started("", seconds, ready.error, ready.detail))
    answer(connection, ready.run)


def answer(connection: Connection, run: Callable[[], Any]) -> None:
    """Time some calls per request until the parent hangs up."""
    while True:
        try:
            connection.recv()
        except (EOFError, OSError):
            return
        run()
        connection.send([timed(run) for _ in range(CALLS)])


def timed(run: Callable[[], Any]) -> float:
    """Milliseconds of one call."""
    begin = time.perf_counter()
    run()
    return (time.perf_counter() - begin) * 1e3


def reason_of(error: BaseException) -> str:
    """An error as one line for a table."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"{error.name.partition('.')[0]} is not installed"
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:REASON]


def _redirect(log: str) -> None:
    """What runtimes print, from Python or from C, goes to the log: stdout holds only results."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sys.stdout.flush()
    for stream in (1, 2):
        os.dup2(file, stream)
