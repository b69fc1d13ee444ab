"""A model and a batch -> a Row per variant: one process each, asked in turn.

    python bench/compare.py bert-base --batch 1                   the protocol: all three phases
    python bench/compare.py --save --phase rivals vit-small       what sets mpq's tolerance
    python bench/compare.py --save --phase mpq vit-small          mpq, also at that tolerance
    python bench/compare.py --variants "mpq,openvino" --rounds 5 resnet50

--save merges the rows into docs/benchmarks/cpu.json, so that the table can be measured in pieces.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial

from models import BATCHES, MODELS
from results import Row, add_rows, check_machine, load, parser, rows
from variants import BAR, INDUCTOR, TIMING, VARIANTS, YARDSTICKS, prepare
from worker import CALLS, Job, Started, Worker

ROUNDS = 15
TOGETHER = 4  # variants that are built at the same time
LIMIT = 400.0  # seconds that a variant may take to be ready
PAUSE = 0.02  # seconds between two processes, for the threads of the first to go to sleep
ANCHORS = 2  # Inductor variants measured again beside the rest, by turns
RIVALS = ("eager", *YARDSTICKS)
MPQ = tuple(name for name in VARIANTS if name.startswith("mpq"))
PEERS = tuple(name for name in VARIANTS if name not in (*RIVALS, *MPQ))
PHASES = {"rivals": RIVALS, "peers": PEERS, "mpq": MPQ}


def compare(
    jobs: Mapping[str, Job], *, rounds: int = ROUNDS, limit: float = LIMIT
) -> dict[str, Row]:
    """{name: Row}: build every job in a process of its own, then time them all in turn."""
    found: dict[str, Row] = {}
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for group in groups(list(jobs)):
            building = {name: stack.enter_context(Worker(jobs[name])) for name in group}
            for name, worker in building.items():
                started = worker.start(limit)
                found[name] = _untimed(started)
                print(f"{name}: {started.reason or 'ready'}", file=sys.stderr, flush=True)
                if not started.reason:
                    workers[name] = worker
        times = _in_turn(workers, rounds)
    expected = rounds * CALLS
    return {name: _timed(found[name], times.get(name), expected) for name in jobs}


def groups(names: Sequence[str]) -> list[list[str]]:
    """What is built at the same time: variants that time kernels while they are built are alone."""
    alone = [[name] for name in names if name in TIMING]
    others = [name for name in names if name not in TIMING]
    return [*(others[k : k + TOGETHER] for k in range(0, len(others), TOGETHER)), *alone]


def measure(
    model: str, batch: int, variants: Sequence[str], *, rounds: int, known: Mapping[str, Row]
) -> dict[str, Row]:
    """The rows of some variants of one cell, against the best Inductor variant among them.

    `known` are rows from before: they give the anchors, and the tolerance of the bar.
    """
    names = [*anchors(variants, known), *variants]
    jobs = {name: partial(prepare, model, batch, name) for name in names if name != BAR}
    if BAR in names:
        tolerance = bar_tolerance(known)
        jobs[BAR] = partial(prepare, model, batch, BAR, tolerance)
    found = compare(jobs, rounds=rounds)
    base = min((r.ms for n, r in found.items() if n in INDUCTOR and r.ms), default=None)
    return {name: replace(found[name], base_ms=base) for name in variants}


def anchors(variants: Sequence[str], known: Mapping[str, Row]) -> list[str]:
    """The fastest Inductor variants so far, unless some of them are to be measured anyway."""
    if any(name in INDUCTOR for name in variants):
        return []
    timed = {name: row.ms for name, row in known.items() if name in INDUCTOR and row.ms}
    return sorted(timed, key=timed.__getitem__)[:ANCHORS]


def bar_tolerance(known: Mapping[str, Row]) -> float:
    """max over Inductor's variants and PT2E int8 of error(variant, fp32)"""
    errors = [known[name].error for name in YARDSTICKS if name in known]
    errors = [error for error in errors if error is not None]
    if not errors:
        raise SystemExit(f"{BAR!r} needs the errors of the others: --save --phase rivals")
    return max(errors)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    phases = _phases(options)
    # The processes inherit it; PyTorch reads it when it is imported, and tells the peers.
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    if options.save:
        check_machine(options.threads)
    for model in [options.model] if options.model else MODELS:
        known = rows(load(), model, options.batch) if options.save else {}
        for phase in phases:
            new = measure(model, options.batch, phase, rounds=options.rounds, known=known)
            known = {**known, **new}
            if options.save:
                add_rows(model, options.batch, new, threads=options.threads)
        shown = {name: known[name] for phase in phases for name in phase}
        print(as_json(model, options.batch, shown) if options.json else as_text(shown), flush=True)


def _phases(options: argparse.Namespace) -> list[Sequence[str]]:
    if options.variants is None:
        return [PHASES[options.phase]] if options.phase else [*PHASES.values()]
    names = options.variants.split(",")
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise SystemExit(f"no variant {', '.join(unknown)}\n  valid  {', '.join(VARIANTS)}")
    return [names]


def as_json(model: str, batch: int, shown: Mapping[str, Row]) -> str:
    cell = {name: {**asdict(row), "ratio": row.ratio} for name, row in shown.items()}
    return json.dumps({"model": model, "batch": batch, "rows": cell})


def as_text(shown: Mapping[str, Row]) -> str:
    """One line per variant, the fastest first, failures last."""
    lines = [f"{'variant':28} {'ms':>9} {'10%':>9} {'90%':>9} {'vs best':>8} {'error':>8}"]
    for name, row in sorted(shown.items(), key=lambda pair: pair[1].ms or float("inf")):
        if row.ms is None:
            lines.append(f"{name:28} {row.reason}")
            continue
        ratio = f"{row.ratio:.2f}x" if row.ratio else "-"
        lines.append(
            f"{name:28} {row.ms:9.2f} {row.low:9.2f} {row.high:9.2f} {ratio:>8} {row.error:8.4f}"
            f"  {row.detail}"
        )
    return "\n".join(lines)


def _in_turn(workers: Mapping[str, Worker], rounds: int) -> dict[str, list[float]]:
    """{name: times}; every round asks each worker once, so that a slow moment hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            times[name] += worker.times()
            time.sleep(PAUSE)
    return times


def _untimed(started: Started) -> Row:
    if started.reason:
        return Row(reason=started.reason)
    return Row(error=started.error, prepare_s=round(started.seconds, 1), detail=started.detail)


def _timed(row: Row, times: Sequence[float] | None, expected: int) -> Row:
    if times is None:
        return row
    if len(times) < expected:
        return Row(reason=f"the process ended after {len(times)} of {expected} calls")
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return replace(row, ms=statistics.median(times), low=tenths[0], high=tenths[-1])


def _parser() -> argparse.ArgumentParser:
    made = parser(__doc__)
    made.add_argument("model", nargs="?", choices=MODELS, help="default: all of them")
    made.add_argument("--batch", type=int, default=BATCHES[0])
    made.add_argument("--phase", choices=PHASES, help="only this part of the protocol")
    made.add_argument("--variants", help="only these, separated by commas")
    made.add_argument("--rounds", type=int, default=ROUNDS)
    made.add_argument("--json", action="store_true", help="one line of JSON per model")
    return made


if __name__ == "__main__":
    main()
