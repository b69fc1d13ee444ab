"""plans -> Report: what runs in which precision, why, what was gained, what more is possible

Not named `explain`: the import of a module of that name would hide the function mpq_fx.explain.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mpq_fx.encoding import encode
from mpq_fx.errors import UnsupportedError
from mpq_fx.facts import Plan, Row
from mpq_fx.remeasured import is_predicted

WIDTH = 120
NO_GRAPH = (
    'no graph of this model was compiled with backend="mpq": call the compiled model; if it was '
    "called, Dynamo ran it eager"
)
FLOATS = ("inductor float", "float")  # variants that stand for the user's model, best first
WORTH = 1.02  # a step of the frontier is offered if it is faster by this factor
ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Entry:
    """One compiled graph: its plan, or the reason why it has none."""

    label: str
    plan: Plan | None
    reason: str = ""
    rows: tuple[Row, ...] = ()  # of a graph without a plan: its sites, all in float
    place: str = ""  # target that the plan runs on, if it was made for another

    @property
    def elsewhere(self) -> str:
        """What a reader of a plan that was made for another target has to know, or ""."""
        if not self.place or self.plan is None:
            return ""
        return (
            f"runs on target {self.place} here; kernels and milliseconds below are those of "
            f"{self.plan.target}, for which the plan was made"
        )

    @property
    def ledger(self) -> tuple[Row, ...]:
        return self.plan.ledger if self.plan else self.rows


@dataclass(frozen=True)
class Share:
    """How much of the model runs in one choice; shares are of all MACs and of all weights."""

    choice: str
    sites: int
    macs: float | None  # None for parameters that no site owns
    weights: float
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class Step:
    """A point of the frontier: what a larger (or smaller) error would buy, and what to type."""

    error: float
    ms: float
    speedup: float  # against what runs now
    size: float | None
    options: Mapping[str, Any]
    measured: float | None = None  # error of its choices, replayed on calls that chose nothing

    @property
    def line(self) -> str:
        typed = f"   options={json.dumps(dict(self.options))}" if self.options else ""
        seen = "" if self.measured is None else f" (measured {self.measured:.2g})"
        allowed = self.options.get("tolerance", self.error)
        return f"at error {allowed:.2g}{seen}: {self.speedup:.2f}× faster{typed}"


@dataclass(frozen=True)
class Report:
    """All that `explain` knows; str() for a terminal, to_json() for programs, to_html() to read."""

    entries: tuple[Entry, ...]
    dynamo: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        from mpq_fx.report_text import text

        return text(self, WIDTH)

    @property
    def rows(self) -> tuple[Row, ...]:
        return tuple(row for entry in self.entries for row in entry.ledger)

    def to_json(self) -> str:
        """Everything as JSON: plans without tensors, coverage, frontier steps, Dynamo's facts."""
        graphs = [
            {
                "label": e.label,
                "reason": e.reason,
                "elsewhere": e.elsewhere,
                "plan": e.plan and _without_tensors(e.plan),
                "rows": encode(e.rows),
                "steps": [encode(step) for step in steps(e.plan)] if e.plan else [],
            }
            for e in self.entries
        ]
        found = {
            "mpq_fx_report": 1,
            "graphs": graphs,
            "coverage": encode(coverage(self)),
            "parameters": encode(self.parameters),
            "dynamo": encode(self.dynamo),
        }
        return json.dumps(found, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)

    def to_html(self, path: str | Path) -> Path:
        """One self-contained page with pictures; it needs neither a network nor JavaScript.

        UnsupportedError without the packages of the extra `report`.
        """
        try:
            from mpq_fx.report_html import page
        except ModuleNotFoundError as error:
            raise UnsupportedError(
                f"an HTML page needs {error.name}, which is not installed",
                fix="pip install 'mpq-fx[report]'",
            ) from error
        path = Path(path)
        path.write_text(page(self), encoding="utf-8")
        return path


def report_of(
    plans: Iterable[tuple[Any, ...]],
    *,
    dynamo: Mapping[str, Any] | None = None,
    parameters: Mapping[str, int] | None = None,
) -> Report:
    """(label, plan or None, reason, rows of a graph without a plan, target that a plan made for
    another runs on) per graph -> Report.

    `dynamo`: graph_breaks {reason: n}, frames {total, ok}, recompile_limit n, unimplemented.
    `parameters`: elements of the whole model ("parameters") and of its graphs ("captured").
    """
    return Report(tuple(Entry(*each) for each in plans), dict(dynamo or {}), dict(parameters or {}))


def coverage(report: Report) -> tuple[Share, ...]:
    """One share per choice by falling MACs, then the parameters without a site and not captured."""
    rows = report.rows
    weights = sum(_numel(rows).values())
    total = max(report.parameters.get("parameters", weights), weights)
    macs = sum(row.site.macs for row in rows)
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.choice, []).append(row)
    owners = {key: row.choice for key, row in zip(_keys(rows)[::-1], rows[::-1], strict=True)}
    shares = [_share(choice, found, macs, total, owners) for choice, found in groups.items()]
    shares.sort(key=lambda share: -(share.macs or 0.0))
    captured = report.parameters.get("captured", weights)
    for name, numel in (
        ("no site (norms, biases, …)", captured - weights),
        ("not captured", total - max(captured, weights)),
    ):
        if numel > 0:
            shares.append(Share(name, 0, None, numel / total, 4 * numel, 4 * numel))
    return tuple(shares)


def _share(choice: str, rows: list[Row], macs: int, total: int, owners: Mapping[str, str]) -> Share:
    """A weight that sites share in several choices was the first site's, and is stored in each."""
    numel = {at: n for at, n in _numel(rows).items() if owners[at[0]] == choice}
    before = {key: n * ITEM_BYTES.get(dtype, 4) for (key, dtype), n in numel.items()}
    after = {
        key: row.weight_bytes for key, row in zip(_keys(rows), rows, strict=True) if row.site.weight
    }
    return Share(
        choice,
        len(rows),
        sum(r.site.macs for r in rows) / max(macs, 1),
        sum(numel.values()) / max(total, 1),
        sum(before.values()),
        sum(after.values()),
    )


def _numel(rows: Iterable[Row]) -> dict[tuple[str, str], int]:
    """Elements per weight; a weight that several sites share counts once."""
    rows = list(rows)
    return {
        (key, row.site.dtype): row.site.weight_numel
        for key, row in zip(_keys(rows), rows, strict=True)
        if row.site.weight
    }


def _keys(rows: Iterable[Row]) -> list[str]:
    """Sites of one weight are named "a", "a#2": the name before the number is the weight's."""
    return [row.site.name.partition("#")[0] for row in rows]


def float_ms(plan: Plan) -> float | None:
    """Measured milliseconds of the user's own model, compiled by Inductor."""
    return next((plan.latency_ms[name] for name in FLOATS if name in plan.latency_ms), None)


def layers_ms(plan: Plan) -> tuple[float, float]:
    """Milliseconds of all sites, each by itself: in float, and in their choices."""
    before = sum(row.ms_before or 0.0 for row in plan.ledger)
    return before, sum(row.ms_after or 0.0 for row in plan.ledger)


def speedup(plan: Plan) -> float | None:
    """Measured ms of float / measured ms of what runs."""
    before, after = float_ms(plan), plan.latency_ms.get(plan.winner)
    return before / after if before and after else None


def now_ms(plan: Plan) -> float | None:
    """Milliseconds of what runs: measured, or predicted by a roofline."""
    if not plan.latency_ms and is_predicted(plan):
        before, after = layers_ms(plan)
        return plan.baseline.get("latency", before) - before + after
    return plan.latency_ms.get(plan.winner)


def steps(plan: Plan) -> tuple[Step, ...]:
    """The frontier in terms of the whole model as it runs now, by growing error."""
    before, sites = layers_ms(plan)
    fixed = plan.baseline.get("latency", before) - before  # in "latency", but in no site
    now = now_ms(plan) or sites + fixed
    found = []
    points = [point for point in plan.points if point.get("resource") == "latency"]
    for point in points if sites > 0 else ():
        cost = point["latency"] - fixed
        # What is outside the sites stays; sites timed alone may add up to more than the whole.
        ms = now - sites + cost if sites < now else now * cost / sites
        about = (point.get("size"), point["options"], point.get("measured"))
        found.append(Step(point["error"], ms, now / ms, *about))
    return tuple(sorted(found, key=lambda step: step.error))


def offers(plan: Plan) -> tuple[Step, ...]:
    """The steps that are faster than what runs, each faster than the one before it."""
    kept: list[Step] = []
    for step in steps(plan):
        if step.speedup >= WORTH * (kept[-1].speedup if kept else 1.0) and step.options:
            kept.append(step)
    return tuple(kept)


def raced_and_refused(plan: Plan) -> list[str]:
    """Every variant, the fastest first; what was raced, compiled in another mode, stands once."""
    raced = sorted(plan.latency_ms, key=lambda name: (plan.latency_ms[name], name))
    others = sorted(plan.errors.keys() - plan.latency_ms.keys())
    return [*raced, *(n for n in others if not any(r.startswith(f"{n}, ") for r in raced))]


def reasons(rows: Iterable[Row]) -> dict[str, tuple[str, ...]]:
    """reason -> the choices it speaks against, over all rows; none for why a site is in float."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        for choice, texts in row.refusals.items():
            for text in texts:
                found.setdefault(text, {})[choice] = None
        if row.reason:
            found.setdefault(row.reason, {})
    return {text: tuple(choices) for text, choices in found.items()}


def speaks_of(row: Row, reason: str) -> bool:
    return reason == row.reason or any(reason in texts for texts in row.refusals.values())


def why_float(reason: str) -> str:
    """A graph without a plan in one line: "training graph: float", "float: observing"."""
    return reason if reason.endswith(": float") else f"float: {reason}"


def bits(row: Row) -> float | None:
    """Stored bits per weight, scales included; None where there is no weight."""
    return 8 * row.weight_bytes / row.site.weight_numel if row.site.weight_numel else None


def weight_bytes(plan: Plan) -> tuple[int, int]:
    """Bytes of the weights of all sites, in the user's precision and as they are stored now."""
    shares = coverage(Report((Entry("", plan),)))
    return sum(s.bytes_before for s in shares), sum(s.bytes_after for s in shares)


def activation_bytes(plan: Plan) -> tuple[float, float] | None:
    """Peak bytes between the ops of a call: of the float model, and of what runs."""
    found = plan.activation_bytes
    return (found["float"], found[plan.winner]) if plan.winner in found else None


def megabytes(count: float) -> str:
    """ "85.1 MB", "3 kB" """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def headline(plan: Plan) -> str:
    """ "error 0.0098 of 0.0110 allowed · 14.1 ms, float 22.3 ms (1.58×) · …" """
    parts = []
    predicted = plan.provenance.get("predicted", {})
    made_up = " on synthetic inputs" if plan.without_data else ""
    if plan.error is not None:
        allowed = f" of {plan.tolerance:.4g} allowed" if plan.tolerance is not None else ""
        parts.append(f"error {plan.error:.4g}{allowed}{made_up}")
    elif "error" in predicted:
        parts.append(f"predicted error {predicted['error']:.4g}{made_up}")
    after, before, gain = plan.latency_ms.get(plan.winner), float_ms(plan), speedup(plan)
    if after is not None:
        against = f", float {before:.3g} ms ({gain:.2f}×)" if before and gain else ""
        parts.append(f"{after:.3g} ms{against}")
    elif is_predicted(plan):
        of_float, of_choices = layers_ms(plan)
        parts.append(f"layers {of_choices:.3g} ms predicted, in float {of_float:.3g} ms")
    before_bytes, after_bytes = weight_bytes(plan)
    parts.append(f"weights {megabytes(before_bytes)} -> {megabytes(after_bytes)}")
    moved = sum(row.choice != row.site.dtype for row in plan.ledger)
    parts.append(f"{moved} of {len(plan.ledger)} sites in another precision")
    return " · ".join(parts)


def dynamo_lines(dynamo: Mapping[str, Any]) -> tuple[str, ...]:
    """Graph breaks, skipped frames and recompile limits, one line each; none if all went well."""
    lines = [
        f"graph break ({n}×): {reason}" for reason, n in dynamo.get("graph_breaks", {}).items()
    ]
    if limit := dynamo.get("recompile_limit", 0):
        lines.append(
            f"recompile limit hit {limit}×: those calls run eager, without mpq; "
            'torch.compile(model, backend="mpq", dynamic=True) recompiles less'
        )
    frames = dynamo.get("frames", {})
    if (skipped := frames.get("total", 0) - frames.get("ok", 0)) > 0:
        lines.append(f"{skipped} of {frames['total']} frames were skipped by Dynamo and run eager")
    lines += [
        f"unsupported by Dynamo ({n}×): {r}" for r, n in dynamo.get("unimplemented", {}).items()
    ]
    return tuple(line.splitlines()[0] for line in lines)


def _without_tensors(plan: Plan) -> dict[str, Any]:
    facts = encode(replace(plan, tensors={}))
    return {**facts, "tensors": sorted(plan.tensors)}
