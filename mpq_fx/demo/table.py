"""measurements of one net -> a table: times against eager and Inductor's best, error, accuracy"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.table import Table

from mpq_fx.demo.variants import EAGER, INDUCTOR, Measurement
from mpq_fx.passes.lower.cpu import processor
from mpq_fx.report import Entry, Report, coverage


def table(title: str, measurements: Sequence[Measurement]) -> Table:
    """One line per variant; every number of a line was measured on the same net."""
    shown = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1))
    shown.add_column("variant", no_wrap=True)
    for name in columns(measurements):
        shown.add_column(name, justify="right")
    shown.add_column("MACs in", overflow="fold")
    for found in measurements:
        scores = [f"{value:.4f}" for value in found.scores.values()]
        error = f"{found.error:.2g}" if found.error else "0"
        shown.add_row(found.name, *times(found, measurements), error, *scores, precisions(found))
    return shown


def columns(measurements: Sequence[Measurement]) -> list[str]:
    timed = ["ms", "× eager", "× Inductor's best"] if is_timed(measurements) else []
    return [*timed, "error", *measurements[0].scores]


def times(found: Measurement, measurements: Sequence[Measurement]) -> list[str]:
    """ms, and how many times faster than eager and than the fastest variant of Inductor"""
    if found.ms is None:
        return []
    eager, inductor = best(measurements, EAGER), best(measurements, INDUCTOR)
    return [f"{found.ms:.3f}", f"{eager / found.ms:.2f}", f"{inductor / found.ms:.2f}"]


def best(measurements: Sequence[Measurement], prefix: str) -> float:
    return min(m.ms for m in measurements if m.ms is not None and m.name.startswith(prefix))


def is_timed(measurements: Sequence[Measurement]) -> bool:
    return all(m.ms is not None for m in measurements)


def precisions(found: Measurement) -> str:
    """ "int8/dynamic 81 %, bfloat16 19 %": shares of the multiply-accumulates, the largest first"""
    if found.plan is None:
        return ""
    shares = coverage(Report((Entry("", found.plan),)))
    kept = [f"{s.choice} {s.macs:.0%}" for s in shares if s.macs is not None and s.macs >= 0.005]
    runs = "" if found.plan.winner == "plan" else f" ({found.plan.winner} won)"
    return ", ".join(kept) + runs


def written(name: str, measurements: Sequence[Measurement], folder: Path) -> list[Path]:
    """One HTML page for each plan of a net; that of the first tolerance has the net's own name."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = []
    for found in measurements:
        if found.report is None:
            continue
        page = f"{name}-{found.name.rpartition(' ')[2]}" if pages else name
        # Dynamo's counters are of the process: they tell of every variant, not of this plan.
        pages.append(replace(found.report, dynamo={}).to_html(folder / f"{page}.html"))
    return pages


def machine() -> str:
    """The processor and the settings that the times depend on."""
    return (
        f"{processor()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, {platform.system()}"
    )
