"""Report -> one HTML page: report.html.j2 filled in, its pictures drawn by report_svg"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from mpq_fx.facts import Plan, Row
from mpq_fx.front import seen_error
from mpq_fx.remeasured import is_predicted
from mpq_fx.report import (
    NO_GRAPH,
    Entry,
    Report,
    activation_bytes,
    bits,
    coverage,
    dynamo_lines,
    float_ms,
    layers_ms,
    megabytes,
    now_ms,
    offers,
    raced_and_refused,
    speedup,
    steps,
    weight_bytes,
    why_float,
)
from mpq_fx.report_svg import Bar, Dot, columns, frontier, rows, stacked
from mpq_fx.report_text import error, milliseconds, shape

COLORS = 8  # of the style sheet: c0 … c7; floats are gray


@dataclass(frozen=True)
class Picture:
    """A drawing with what it shows and how to read it."""

    title: str
    caption: str
    svg: Markup


def page(report: Report) -> str:
    """The report as a self-contained page."""
    source = files("mpq_fx").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(error=error, shape=shape, bytes=megabytes, ms=milliseconds)
    kinds = kinds_of(report)
    shares = coverage(report)
    return environment.from_string(source).render(
        graphs=[_graph(entry, kinds) for entry in report.entries],
        kinds=kinds,
        shares=shares,
        pictures_of_coverage=_coverage(shares, kinds),
        dynamo=dynamo_lines(report.dynamo),
        nothing=NO_GRAPH,
    )


def kinds_of(report: Report) -> dict[str, str]:
    """choice -> class of the style sheet, by appearance; a site's own precision is gray."""
    kinds: dict[str, str] = {}
    for row in report.rows:
        fresh = "own" if row.choice == row.site.dtype else f"c{len(kinds) % COLORS}"
        kinds.setdefault(row.choice, fresh)
    return kinds


def _graph(entry: Entry, kinds: Mapping[str, str]) -> dict[str, Any]:
    plan = entry.plan
    facts: dict[str, Any] = {"label": entry.label, "reason": entry.reason, "plan": plan}
    facts["elsewhere"] = entry.elsewhere
    if plan is None:
        return {**facts, "why": why_float(entry.reason), "rows": _sites(entry.rows, kinds)}
    before, after = weight_bytes(plan)
    return {
        **facts,
        "predicted": plan.provenance.get("predicted", {}),
        "float_ms": float_ms(plan),
        "speedup": speedup(plan),
        "layers_ms": layers_ms(plan) if is_predicted(plan) else None,
        "moved": sum(row.choice != row.site.dtype for row in plan.ledger),
        "bytes": (before, after),
        "activations": activation_bytes(plan),
        "race": _race(plan),
        "pictures": _pictures(plan, kinds),
        "unraced": [name for name in raced_and_refused(plan) if name not in plan.latency_ms],
        "offers": [(step, json.dumps(dict(step.options))) for step in offers(plan)],
        "rows": _sites(plan.ledger, kinds),
        "timings": _timings(plan),
        "provenance": json.dumps(plan.provenance, indent=2, sort_keys=True, default=str),
    }


def _sites(rows: Sequence[Row], kinds: Mapping[str, str]) -> list[tuple[Row, str, float | None]]:
    """(row, class of its choice, bits of a weight) of every line of the table of sites."""
    return [(row, kinds[row.choice], bits(row)) for row in rows]


def _race(plan: Plan) -> Markup | None:
    """Milliseconds of every variant that was raced, the fastest first."""
    if not plan.latency_ms:
        return None
    bars = []
    for name, ms in sorted(plan.latency_ms.items(), key=lambda item: item[1]):
        found = plan.errors.get(name)
        words = f" · error {error(found)}" if found is not None else ""
        runs = " · runs" if name == plan.winner else ""
        bars.append(Bar(name, ms, "win" if runs else "own", words + runs))
    return Markup(rows("Milliseconds of one call, per variant", bars, "ms"))


def _timings(plan: Plan) -> Markup:
    spent = sorted(plan.timings.items(), key=lambda item: -item[1])
    bars = [Bar(name, seconds, "win", "") for name, seconds in spent]
    return Markup(rows("Seconds per stage", bars, "s"))


def _pictures(plan: Plan, kinds: Mapping[str, str]) -> list[Picture]:
    """Only the pictures for which the plan has numbers."""
    ledger = plan.ledger
    drawn = [_frontier(plan)] if steps(plan) else []
    drawn += [_sizes(plan)] if smaller(plan) else []
    if any(row.predicted_error for row in ledger):
        drawn.append(_errors(ledger, kinds))
    if any(row.ms_after is not None for row in ledger):
        drawn.append(_latency(plan, kinds))
    if any(bits(row) for row in ledger):
        drawn.append(_bits(ledger, kinds))
    return drawn


def _frontier(plan: Plan) -> Picture:
    dots = [
        Dot(s.ms, s.error if s.measured is None else s.measured, "point", s.line)
        for s in steps(plan)
    ]
    now = now_ms(plan)
    if now is not None and plan.error is not None:
        dots.append(
            Dot(
                now,
                plan.error,
                "win",
                f"runs now: {now:.3g} ms, error {plan.error:.3g}",
                large=True,
            )
        )
    return _traded(
        "What is possible",
        "By the tables, no plan is both faster and more exact than these. The large dot runs now, "
        "the dashed line is the tolerance. Milliseconds are predicted, errors replayed where there "
        "was time.",
        "Predicted latency against error",
        "ms of one call",
        dots,
        plan.tolerance,
    )


def _sizes(plan: Plan) -> Picture:
    return _traded(
        "How small it can be",
        "By the tables, no plan has both smaller weights and a smaller error than these. Sizes are "
        "exact, errors replayed where there was time.",
        "Bytes of weights against error",
        "MB of weights",
        [_size_dot(point["size"], seen_error(point)) for point in smaller(plan)],
        plan.tolerance,
    )


def _traded(
    title: str, caption: str, alternative: str, unit: str, dots: list[Dot], line: float | None
) -> Picture:
    """Errors against what they buy, the dearest first."""
    ordered = sorted(dots, key=lambda dot: -dot.x)
    return Picture(title, caption, Markup(frontier(alternative, ordered, (unit, "error"), line)))


def _size_dot(size: float, error: float) -> Dot:
    return Dot(size / 1e6, error, "point", f"{megabytes(size)} at error {error:.2g}")


def smaller(plan: Plan) -> list[Mapping[str, Any]]:
    """The points of the frontier of size."""
    return [point for point in plan.points if point.get("resource") == "size"]


def _errors(ledger: tuple[Row, ...], kinds: Mapping[str, str]) -> Picture:
    bars = [
        Bar(
            row.site.name,
            row.predicted_error or 0.0,
            kinds[row.choice],
            f"{row.site.name}: {error(row.predicted_error)} as {row.choice}",
        )
        for row in ledger
    ]
    return Picture(
        "Error per site",
        "Relative RMS error at the outputs if this site alone were in its choice; squares add up.",
        Markup(columns("Predicted error per site", bars, "error")),
    )


def _latency(plan: Plan, kinds: Mapping[str, str]) -> Picture:
    bars = [
        Bar(
            row.site.name,
            row.ms_after or 0.0,
            kinds[row.choice],
            f"{row.site.name}: {row.ms_before or 0.0:.3g} -> {row.ms_after or 0.0:.3g} ms",
            row.ms_before or 0.0,
        )
        for row in plan.ledger
    ]
    before, after = layers_ms(plan)
    how = "predicted, not measured" if is_predicted(plan) else "timed alone"
    return Picture(
        "Latency per site",
        f"Each site {how}: {before:.3g} ms before (pale), {after:.3g} ms after, in all.",
        Markup(columns("Milliseconds per site, before and after", bars, "ms")),
    )


def _bits(ledger: tuple[Row, ...], kinds: Mapping[str, str]) -> Picture:
    owners = [(row, bits(row)) for row in ledger]
    bars = [
        Bar(
            row.site.name,
            width,
            kinds[row.choice],
            f"{row.site.name}: {width:.4g} bits per weight as {row.choice}",
        )
        for row, width in owners
        if width
    ]
    return Picture(
        "Bits per layer",
        "Stored bits per weight, scales and padding included.",
        Markup(columns("Bits per weight, per layer", bars, "bits")),
    )


def _coverage(shares: Any, kinds: Mapping[str, str]) -> list[tuple[str, Markup]]:
    """Two stacked bars: of multiply-accumulates, and of weights."""

    def drawn(title: str, values: list[tuple[str, float]]) -> tuple[str, Markup]:
        bars = [
            Bar(name, v, kinds.get(name, "none"), f"{name}: {v:.1%}") for name, v in values if v
        ]
        return title, Markup(stacked(title, bars))

    found = []
    if any(s.macs for s in shares):
        found.append(drawn("Multiply-accumulates", [(s.choice, s.macs or 0.0) for s in shares]))
    if shares:
        found.append(drawn("Weights", [(s.choice, s.weights) for s in shares]))
    return found
