"""Report -> text for a terminal: one line per site, footnotes for reasons, then the totals"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mpq_fx.facts import Plan, Row
from mpq_fx.report import (
    NO_GRAPH,
    Entry,
    Report,
    Share,
    coverage,
    dynamo_lines,
    headline,
    megabytes,
    offers,
    raced_and_refused,
    reasons,
    speaks_of,
    why_float,
)

WIDE = 110  # from here on there is room for shapes and kernels
FOOTNOTES = 12  # reasons listed; to_json() and to_html() have all


def text(report: Report, width: int) -> str:
    """The report as plain text of at most `width` columns."""
    stream = io.StringIO()
    console = Console(file=stream, width=width, color_system=None, legacy_windows=False)
    console.print(rendered(report, width))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def rendered(report: Report, width: int) -> RenderableType:
    """The report for a rich console of `width` columns."""
    parts: list[RenderableType] = []
    for entry in report.entries:
        parts += _entry(entry, width)
    if not report.entries:
        parts.append(Text(NO_GRAPH))
    if shares := coverage(report):
        parts += [_title("Coverage"), _coverage(shares)]
    if lines := dynamo_lines(report.dynamo):
        parts += [_title("Dynamo"), *map(_bullet, lines)]
    return Group(*parts)


def _entry(entry: Entry, width: int) -> Iterator[RenderableType]:
    plan = entry.plan
    if plan is None:
        yield _title(entry.label)
        yield _bullet(why_float(entry.reason))
        if entry.rows:
            yield _sites(entry.rows, {}, width)
        return
    yield _title(f"{entry.label} · target {plan.target}")
    yield Text(headline(plan))
    if entry.reason:
        yield _bullet(f"runs in float: {entry.reason}")
    if entry.elsewhere:
        yield _bullet(entry.elsewhere)
    notes = {reason: k + 1 for k, reason in enumerate(reasons(plan.ledger))}
    yield _sites(plan.ledger, notes, width)
    yield from _footnotes(plan, notes)
    yield from _race(plan)
    yield from _more(plan)
    yield from _facts(plan)


def _sites(rows: tuple[Row, ...], notes: Mapping[str, int], width: int) -> Table:
    """One line per site; the columns have fixed widths, so that blocks of a model line up."""
    wide = width >= WIDE
    table = _table(padding=(0, 1, 0, 0))
    columns = [c for c in COLUMNS if wide or not c.wide]
    for column in columns:
        table.add_column(
            column.title,
            width=column.width if wide else column.narrow,
            justify=column.justify,
            no_wrap=True,
        )
    for row in rows:
        style = "" if row.choice != row.site.dtype else "dim"
        table.add_row(*(column.cell(row, notes, wide) for column in columns), style=style)
    return table


@dataclass(frozen=True)
class Column:
    """What a column of the table of sites shows; `narrow` is its width where room is short."""

    title: str
    width: int
    narrow: int
    cell: Callable[[Row, Mapping[str, int], bool], str]
    justify: Literal["left", "right"] = "left"
    wide: bool = False  # left out where room is short


def _numbers(row: Row, notes: Mapping[str, int], _: bool) -> str:
    return " ".join(
        str(k) for reason, k in notes.items() if k <= FOOTNOTES and speaks_of(row, reason)
    )


COLUMNS = (
    Column("site", 32, 28, lambda row, _, wide: shorten(row.site.name, 32 if wide else 28)),
    Column("weight", 10, 0, lambda row, *_: shape(row.site.weight_shape), wide=True),
    Column("choice", 24, 24, lambda row, *_: shorten(row.choice, 24)),
    Column("error", 6, 6, lambda row, *_: error(row.predicted_error), "right"),
    Column("ms", 11, 11, lambda row, *_: _change(row), "right"),
    Column(
        "kernel",
        18,
        0,
        lambda row, *_: row.kernel.removesuffix(".default").rpartition(".")[2][:18],
        wide=True,
    ),
    Column("why", 6, 5, _numbers),
)


def _footnotes(plan: Plan, notes: Mapping[str, int]) -> Iterator[RenderableType]:
    """The numbers of column "why": reasons, and the choices that they speak against."""
    against = reasons(plan.ledger)
    for reason, k in list(notes.items())[:FOOTNOTES]:
        sites = sum(speaks_of(row, reason) for row in plan.ledger)
        whom = ", ".join(against[reason][:3]) + (", …" if len(against[reason]) > 3 else "")
        named = f"not {whom}: " if whom else "in float: "
        yield Padding(Text(f"{k:>2}  {named}{reason} ({_count(sites, 'site')})"), (0, 0, 0, 2))
    if len(notes) > FOOTNOTES:
        yield _bullet(f"{len(notes) - FOOTNOTES} more reasons: to_json() and to_html() have all")


def _race(plan: Plan) -> Iterator[RenderableType]:
    """Every variant that was raced or refused, and which one runs."""
    names = raced_and_refused(plan)
    if not names:
        return
    table = _table()
    for column in ("variant", "ms", "error", "activations"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    table.add_column()
    for name in names:
        ms = plan.latency_ms.get(name)
        table.add_row(
            name,
            "-" if ms is None else f"{ms:.3g}",
            error(plan.errors.get(name)),
            megabytes(held) if (held := plan.activation_bytes.get(name)) else "-",
            _verdict(plan, name),
            style="bold" if name == plan.winner else "",
        )
    yield _title("Raced end to end" if plan.latency_ms else "End to end, without a race")
    yield table


def _verdict(plan: Plan, name: str) -> str:
    if name == plan.winner:
        return "runs"
    found = plan.errors.get(name)
    if plan.tolerance is not None and found is not None and found > plan.tolerance:
        return f"error above the {plan.tolerance:.3g} allowed"
    return "" if name in plan.latency_ms else "not raced"


def _more(plan: Plan) -> Iterator[RenderableType]:
    if found := offers(plan):
        yield _title("What more is possible (predicted)")
        yield from (_bullet(step.line) for step in found)


def _facts(plan: Plan) -> Iterator[RenderableType]:
    if plan.solver:
        s = plan.solver
        proof = "proved best" if s.status == "OPTIMAL" else f"at most {s.gap:.2%} from the best"
        yield _title("Solver")
        yield _bullet(
            f"{s.status.lower()} ({proof}): {s.objective[0]} {s.value:.4g}, bound "
            f"{s.bound:.4g}, gap {s.gap:.2%}, {s.seconds:.2g} s"
        )
    if plan.timings:
        spent = sorted(plan.timings.items(), key=lambda item: -item[1])
        yield _title(f"Time spent: {sum(plan.timings.values()):.3g} s")
        yield _bullet(" · ".join(f"{name} {seconds:.2g} s" for name, seconds in spent))
    if plan.notes:
        yield _title("Notes")
        yield from map(_bullet, plan.notes)


def _coverage(shares: tuple[Share, ...]) -> Table:
    table = _table()
    for column in ("precision", "sites", "MACs", "weights", "bytes"):
        table.add_column(column, justify="left" if column == "precision" else "right")
    for share in shares:
        table.add_row(
            share.choice,
            str(share.sites or "-"),
            "-" if share.macs is None else f"{share.macs:.1%}",
            f"{share.weights:.1%}",
            f"{megabytes(share.bytes_before)} -> {megabytes(share.bytes_after)}",
        )
    return table


def shorten(name: str, limit: int) -> str:
    """The end of a path tells most: "encoder.layer.10.output" -> "…layer.10.output"."""
    if len(name) <= limit:
        return name
    tail = name[len(name) - limit + 1 :]
    _, dot, rest = tail.partition(".")
    return f"…{rest}" if dot and len(rest) > limit // 2 else f"…{tail}"


def shape(sizes: tuple[object, ...]) -> str:
    return "×".join(map(str, sizes)) or "-"


def _change(row: Row) -> str:
    if row.ms_before is None or row.ms_after is None:
        return "-"
    if row.ms_before == row.ms_after:
        return milliseconds(row.ms_after)
    return f"{milliseconds(row.ms_before)}>{milliseconds(row.ms_after)}"


def milliseconds(value: float) -> str:
    """Three digits, at most five characters below 1000: "0.004", "1.89", "18.9"."""
    return f"{value:.3f}" if value < 1 else f"{value:.3g}"


def error(value: float | None) -> str:
    """ "1.7e-3", two digits, without the zero of "e-03"."""
    if value is None:
        return "-"
    return "0" if value == 0 else f"{value:.1e}".replace("e-0", "e-")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _table(padding: tuple[int, int, int, int] = (0, 3, 0, 0)) -> Table:
    return Table(box=None, pad_edge=False, padding=padding, header_style="underline")


def _title(words: str) -> Text:
    return Text(f"\n{words}", style="bold")


def _bullet(words: str) -> Padding:
    return Padding(Text(words), (0, 0, 0, 2))
