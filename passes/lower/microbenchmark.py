"""ms of one call of a function: warmed up, median, bounded in time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

WARM_SECONDS, SECONDS, CALLS = 0.003, 0.015, 200


def finish() -> None:
    """Wait for what was launched on a GPU: a call returns before that is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def milliseconds(call: Callable[[], Any]) -> float:
    """Median over as many calls as fit in SECONDS, at least three."""
    call()
    end = time.perf_counter() + WARM_SECONDS
    while time.perf_counter() < end:
        call()
        finish()
    times: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(times) < 3 or (time.perf_counter() < end and len(times) < CALLS):
        begin = time.perf_counter()
        call()
        finish()
        times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)
