"""gpu.json -> the page of bars and tables in docs/benchmarks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FLOAT, INT_MM, SCALED_MM = "torch bfloat16", "torch._int_mm", "torch._scaled_mm"
FEW_ROWS = 16  # up to here a linear waits for its weight
LARGE = 4096  # N and K from here on
QUANTIZE = "quantize + "  # in front of a choice: from x in bfloat16
FORMATS = ("int4*bfloat16", "int8*bfloat16", "int8/dynamic", "fp8_e4m3/dynamic")  # that peers have
PEERS = ("torchao", "torchao-mslk", "gemlite")
Cell = tuple[str, str, int]  # model, layer, rows
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Bar:
    """What kernels should reach: a number of each case it is about, and the least it may be."""

    about: str
    least: float
    cases: Mapping[str, float]

    def __str__(self) -> str:
        if not self.cases:
            return f"- {self.about}: no case."
        met = sum(value >= self.least for value in self.cases.values())
        where = min(self.cases, key=lambda case: self.cases[case])
        return (
            f"- {self.about}: {met} of {len(self.cases)} cases reach {self.least:g}; the least is"
            f" {self.cases[where]:.2f} ({where})."
        )


def bars(found: Mapping[str, Any]) -> Iterator[Bar]:
    """What the kernels were built to reach."""
    cells = {cell: alone(rows) for cell, rows in by_cell(found["timed"]).items()}
    copy = found["copy_gb_per_s"]
    yield Bar(
        f"share of the copy bandwidth ({copy:.0f} GB/s), up to {FEW_ROWS} rows and quantizations",
        0.8,
        {
            f"{name_of(cell)}, {row['variant']}": share(row, copy)
            for cell, rows in cells.items()
            for row in rows.values()
            if row["kernel"] and (cell[2] <= FEW_ROWS or cell[0] == "quantize")
        },
    )
    yield Bar("int8 by int8 against torch._int_mm", 0.9, ratios(cells, INT_MM, is_int8))
    yield Bar("fp8 by fp8 against torch._scaled_mm", 0.9, ratios(cells, SCALED_MM, is_float8))
    yield Bar(
        f"int4 weights alone against bfloat16, up to {FEW_ROWS} rows, N and K from {LARGE}",
        2.5,
        ratios(cells, FLOAT, is_int4_alone, only=is_large),
    )
    yield Bar(
        "the fastest kernel of a layer against bfloat16",
        1.0,
        {
            name_of(cell): rows[FLOAT]["microseconds"] / min(kernels)
            for cell, rows in cells.items()
            if FLOAT in rows
            and (kernels := [row["microseconds"] for row in rows.values() if row["kernel"]])
        },
    )


def by_cell(timed: Sequence[Row]) -> dict[Cell, dict[str, Row]]:
    cells: dict[Cell, dict[str, Row]] = {}
    for row in timed:
        cells.setdefault((row["model"], row["layer"], row["rows"]), {})[row["variant"]] = row
    return cells


def alone(rows: Mapping[str, Row]) -> dict[str, Row]:
    """What computes from codes, and what PyTorch has: neither peers nor what stands beside them."""
    first = (QUANTIZE, *(f"{peer} " for peer in PEERS))
    return {name: row for name, row in rows.items() if not name.startswith(first)}


def name_of(cell: Cell) -> str:
    return f"{cell[0]} {cell[1]}, {cell[2]} rows"


def share(row: Row, copy: float) -> float:
    """Bytes that have to move, per second, of what a copy moves."""
    return 1e-3 * row["bytes"] / row["microseconds"] / copy


def ratios(
    cells: Mapping[Cell, Mapping[str, Row]],
    baseline: str,
    is_meant: Callable[[str], bool],
    only: Callable[[Row], bool] = lambda row: True,
) -> dict[str, float]:
    """How many times faster than the baseline each variant is that is meant."""
    return {
        f"{name_of(cell)}, {name}": rows[baseline]["microseconds"] / row["microseconds"]
        for cell, rows in cells.items()
        for name, row in rows.items()
        if baseline in rows and row["kernel"] and is_meant(name) and only(row)
    }


def is_int8(variant: str) -> bool:
    return variant.startswith("int8") and "/" in variant


def is_float8(variant: str) -> bool:
    return variant.startswith("fp8") and "/" in variant


def is_int4_alone(variant: str) -> bool:
    return variant.startswith("int4") and variant.endswith("*bfloat16")


def is_large(row: Row) -> bool:
    return row["rows"] <= FEW_ROWS and min(row["n"], row["k"]) >= LARGE


def page(found: Mapping[str, Any]) -> str:
    """The bars, and a table for each model."""
    versions = ", ".join(f"{name} {of}" for name, of in found["versions"].items())
    lines = [
        "# Kernels on a GPU",
        "",
        f"Written by `python bench/gpu.py --save` on {found['date']}: {found['device']}"
        f" ({found['architecture']}), {versions}, CUDA {found['cuda']}.",
        "Microseconds are medians with a cold L2 cache, variants by turns; results of ours were",
        "compared with the reference on the same codes before they were timed. Dynamic formats",
        "start from codes, beside torchao and gemlite from bfloat16; errors there are against",
        "the layer in float64 before it was quantized.",
        "",
        *map(str, bars(found)),
    ]
    cells = by_cell(found["timed"])
    for model in dict.fromkeys(cell[0] for cell in cells):
        mine = {cell: rows for cell, rows in cells.items() if cell[0] == model}
        lines += ["", f"## {model}", "", *table({at: alone(rows) for at, rows in mine.items()})]
        if compared := [*beside(mine)]:
            lines += ["", "From bfloat16 to bfloat16, bias included:", "", *compared]
    if found["left_out"]:
        lines += ["", "## Left out", "", *left_out(found)]
    return "\n".join(lines) + "\n"


def table(cells: Mapping[Cell, Mapping[str, Row]]) -> Iterator[str]:
    """A line per layer and number of rows, a column per variant; the fastest in bold."""
    names = list(dict.fromkeys(name for rows in cells.values() for name in rows))
    yield "| layer | N × K | rows | " + " | ".join(names) + " |"
    yield "|---|---|---:|" + "---:|" * len(names)
    for (_, layer, count), rows in cells.items():
        least = min(row["microseconds"] for row in rows.values())
        first = next(iter(rows.values()))
        shown = [in_words(rows[name], least) if name in rows else "–" for name in names]
        yield f"| {layer} | {first['n']} × {first['k']} | {count} | " + " | ".join(shown) + " |"


def beside(cells: Mapping[Cell, Mapping[str, Row]]) -> Iterator[str]:
    """A line per layer, number of rows and format, a column per package; none without peers."""
    known = {name for rows in cells.values() for name in rows}
    peers = [peer for peer in PEERS if any(name.startswith(f"{peer} ") for name in known)]
    if not peers:
        return
    yield "| layer | N × K | rows | format | mpq | " + " | ".join(peers) + " |"
    yield "|---|---|---:|---|---:|" + "---:|" * len(peers)
    for (_, layer, count), rows in cells.items():
        for fmt in FORMATS:
            ours = rows.get(QUANTIZE + fmt, rows.get(fmt))
            shown = [ours, *(rows.get(f"{peer} {fmt}") for peer in peers)]
            least = min((row["microseconds"] for row in shown if row), default=0.0)
            size = next(f"{row['n']} × {row['k']}" for row in rows.values())
            words = [with_error(row, least) if row else "–" for row in shown]
            yield f"| {layer} | {size} | {count} | {fmt} | " + " | ".join(words) + " |"


def with_error(row: Row, least: float) -> str:
    return f"{in_words(row, least)} ({100 * row['float_error']:.2g} %)"


def left_out(found: Mapping[str, Any]) -> Iterator[str]:
    """What could not run, in how many layers and rows, and why."""
    count = sum(cell[0] != "quantize" for cell in by_cell(found["timed"]))
    reasons = Counter((each["variant"], each["reason"]) for each in found["left_out"])
    for (variant, reason), cases in reasons.items():
        yield f"- {variant}, {cases} of {count} cases: {reason}"


def in_words(row: Row, least: float) -> str:
    text = f"{row['microseconds']:.1f}"
    return f"**{text}**" if row["microseconds"] == least else text
