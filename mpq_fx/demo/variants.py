"""One trained net -> the ways to run it: eager, Inductor's six, and mpq at some tolerances."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import mpq_fx
from mpq_fx.config import Config
from mpq_fx.demo.nets import Batch, Scores, Subject
from mpq_fx.dynamo import many_variants
from mpq_fx.errors import UnsupportedError
from mpq_fx.facts import Plan
from mpq_fx.numerics import relative_rms
from mpq_fx.report import Report
from mpq_fx.verify import race

EAGER = "eager float32"
INDUCTOR = "inductor"  # how the names of its variants begin
BUDGET = 30.0  # seconds for each plan: half of the default, since the nets are small
ROUNDS = 200  # timed calls of each variant, as far as the seconds allow
# What follows the dtype in the name of a variant -> Inductor's settings; frozen: constant weights.
MODES: dict[str, dict[str, Any]] = {
    "": {"freezing": False},
    ", frozen": {"freezing": True},
    ", max-autotune": {
        "freezing": True,
        "max_autotune": True,
        "autotune_num_choices_displayed": 0,  # nothing on the terminal
        "max_autotune_report_choices_stats": False,
    },
}
Run = Callable[..., Tensor]


@dataclass(frozen=True)
class Variant:
    """One way to run a net; `report` and `plan` where mpq made it."""

    name: str
    run: Run
    dtype: torch.dtype = torch.float32  # of its floating inputs
    report: Report | None = None
    plan: Plan | None = None


@dataclass(frozen=True)
class Measurement:
    """What one variant did on the measured batches: all of it on the same net."""

    name: str
    ms: float | None  # median of one call; None where speed means nothing
    error: float  # ‖y − y_float‖ / ‖y_float‖ over all measured batches
    scores: Scores
    report: Report | None = None
    plan: Plan | None = None


def measure(
    subject: Subject,
    tolerances: Sequence[str | float],
    *,
    target: str,
    seconds: float = 20.0,
    say: Callable[[str], None] = lambda text: None,
) -> list[Measurement]:
    """Build every variant of one net, then judge all and time them in turn."""
    is_timed = target != "reference"
    dtypes = (torch.float32, torch.bfloat16) if is_timed else ()
    with many_variants(len(dtypes) * len(MODES) + len(tolerances)):
        variants = [Variant(EAGER, subject.model)]
        for dtype, mode in itertools.product(dtypes, MODES):
            say(f"compiling {INDUCTOR} {name_of(dtype)}{mode}")
            variants.append(inductor(subject, dtype, mode))
        for tolerance in tolerances:
            say(f"planning at tolerance {tolerance}")
            config = Config(tolerance=tolerance, target=target, time_budget=BUDGET)
            variants.append(quantized(subject, config))
        say("measuring")
        return judged(subject, variants, seconds if is_timed else 0.0)


def inductor(subject: Subject, dtype: torch.dtype, mode: str) -> Variant:
    """torch.compile as a user would have it, in one of MODES."""
    import torch._inductor.config as settings

    model = copy.deepcopy(subject.model).to(dtype)
    # Equal options would share code with another variant.  As an option alone, freezing is too
    # late for the part of Inductor that reads it while it compiles.
    compiled = torch.compile(model, fullgraph=True, options=MODES[mode])
    with settings.patch(MODES[mode]), torch.inference_mode():
        compiled(*cast(subject.measured[0], dtype))
    return Variant(f"{INDUCTOR} {name_of(dtype)}{mode}", compiled, dtype)


def quantized(subject: Subject, config: Config) -> Variant:
    """One line of the user's code changed: observe the calibration batches, then solve."""
    model = copy.deepcopy(subject.model)
    compiled = torch.compile(model, backend="mpq", options={"config": config})  # type: ignore[call-overload]
    with torch.inference_mode():
        for batch in subject.calibration:
            compiled(*batch)
    report = mpq_fx.explain(compiled)
    plans = [entry.plan for entry in report.entries if entry.plan is not None]
    if len(plans) != 1:
        reasons = "; ".join(entry.reason for entry in report.entries) or "no graph was captured"
        raise UnsupportedError(f"{subject.name} has {len(plans)} plans and not one: {reasons}")
    name = f"mpq, tolerance {config.tolerance}"
    labeled = replace(
        report, entries=tuple(replace(e, label=f"{subject.name}: {name}") for e in report.entries)
    )
    return Variant(name, compiled, report=labeled, plan=plans[0])


def judged(subject: Subject, variants: Sequence[Variant], seconds: float) -> list[Measurement]:
    """Outputs of every variant on all measured batches, then times on the first one, in turn."""
    with torch.inference_mode():
        outputs = {v.name: outputs_of(v, subject.measured) for v in variants}
        calls = {v.name: caller(v, subject.measured[0]) for v in variants if seconds}
        times = race(calls, rounds=ROUNDS, seconds=seconds)
    reference = outputs[variants[0].name]
    return [
        Measurement(
            v.name,
            times[v.name].median if times else None,
            relative_rms(outputs[v.name], reference),
            subject.scores(outputs[v.name], reference),
            v.report,
            v.plan,
        )
        for v in variants
    ]


def outputs_of(variant: Variant, batches: Sequence[Batch]) -> Tensor:
    return torch.cat([variant.run(*cast(batch, variant.dtype)).float() for batch in batches])


def caller(variant: Variant, batch: Batch) -> Callable[[], Tensor]:
    inputs = cast(batch, variant.dtype)
    return lambda: variant.run(*inputs)


def cast(batch: Batch, dtype: torch.dtype) -> Batch:
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in batch)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
