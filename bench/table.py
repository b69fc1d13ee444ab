"""cpu.json -> docs/benchmarks/cpu.md, and the summary between the markers of README.md

python bench/table.py
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from models import BATCHES, MODELS
from results import FILE, Row, load, rows
from variants import BAR, INDUCTOR, VARIANTS

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- benchmark table -->", "<!-- benchmark table end -->"
SHOWN = ("pt2e int8", "openvino", "openvino int8", "mpq all bf16", "mpq", BAR)
NONE = "–"
TEXT = ("", "model", "variant", "remark", "stages")  # heads of columns that hold words

EXPLANATION = """\
Median milliseconds of one call, with the error of the output against fp32 in brackets: the largest
relative RMS over inputs that were not used for calibration. Weights are random, so these errors
compare arithmetic; they are not accuracies. Each variant runs in a process of its own, and all are
asked in turn. `mpq` has its default tolerance, the error of the whole model in bfloat16, and 120 s
to plan; `mpq bar` may have the largest error among Inductor's variants and PT2E int8; `mpq all
bf16` shows what is left without integers. Behind a time stands its share of the best Inductor
variant's, measured by turns in the same run: compare these, since milliseconds of different runs
differ by more than many variants do."""


def page(results: Mapping[str, Any]) -> str:
    """cpu.md"""
    parts = [
        "# Latency on a CPU",
        "Written by `python bench/table.py` from `cpu.json`; `python bench/compare.py --help` tells"
        " how to measure it.",
        machine_line(results["machine"]),
        EXPLANATION,
        summary(results),
        *(detail(results, model, batch) for model, batch in cells(results)),
        overhead(results.get("overhead", {})),
        tuning(results.get("tuning", {})),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def readme_block(results: Mapping[str, Any]) -> str:
    """What stands between the markers."""
    return "\n\n".join([machine_line(results["machine"]), summary(results), EXPLANATION])


def filled(readme: str, block: str) -> str:
    """The README with the text between its markers replaced."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"README.md lacks the markers\n  fix  write {BEGIN} and {END} into it")
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


def cells(results: Mapping[str, Any]) -> list[tuple[str, int]]:
    """(model, batch) of what was measured, in the order of the models."""
    found = results["cells"]
    batches = {int(batch) for cell in found.values() for batch in cell} | set(BATCHES)
    return [
        (model, batch)
        for model in MODELS
        for batch in sorted(batches)
        if str(batch) in found.get(model, {})
    ]


def summary(results: Mapping[str, Any]) -> str:
    """One line per cell: the best Inductor variant and those that matter most beside it."""
    lines = []
    for model, batch in cells(results):
        cell = rows(results, model, batch)
        timed = {name: row for name, row in cell.items() if name in INDUCTOR and row.ms}
        best = min(timed, key=lambda name: timed[name].ms or 0.0, default=None)
        first = f"{plainly(timed[best])} {best.removeprefix('inductor ')}" if best else NONE
        others = [brief(cell.get(name), is_ours=name.startswith("mpq")) for name in SHOWN]
        lines.append((f"{model} ×{batch}", first, *others))
    return table(("", "best Inductor", *SHOWN), lines)


def brief(row: Row | None, *, is_ours: bool) -> str:
    """ "5.21 (.018) 0.91×": the share is of the best Inductor variant in the same run."""
    if row is None or row.ms is None:
        return NONE if row is None else "failed"
    if row.ratio is None:
        return plainly(row)
    share = f"{row.ratio:.2f}×"
    return f"{plainly(row)} {f'**{share}**' if is_ours else share}"


def plainly(row: Row) -> str:
    """ "5.21 (.018)" """
    assert row.ms is not None
    return f"{milliseconds(row.ms)} ({error(row.error)})"


def detail(results: Mapping[str, Any], model: str, batch: int) -> str:
    """Every variant of one cell, in the order of VARIANTS; what failed says why."""
    cell = rows(results, model, batch)
    lines = []
    for name in VARIANTS:
        row = cell.get(name)
        if row is None:
            lines.append((name, NONE, NONE, NONE, NONE, "not measured"))
        elif row.ms is None or row.low is None or row.high is None:
            lines.append((name, NONE, NONE, NONE, NONE, row.reason))
        else:
            spread = f"{milliseconds(row.low)}–{milliseconds(row.high)}"
            share = f"{row.ratio:.2f}×" if row.ratio else NONE
            lines.append((name, milliseconds(row.ms), spread, share, error(row.error), row.detail))
    heads = ("variant", "ms", "10–90 %", "of best Inductor", "error", "remark")
    return f"## {model}, batch {batch}\n\n{table(heads, lines)}"


OVERHEAD = {  # of a chain -> head of its column
    "watched": "watched tensors",
    "bare": "compiled, µs",
    "watch": "watch, µs",
    "lifecycle": "call, µs",
    "float": "float, µs",
    "observing": "observed, µs",
}


def overhead(found: Mapping[str, Any]) -> str:
    """Cost of a call through mpq besides the compiled function."""
    if not found:
        return ""
    lines = [tuple(f"{chain[name]:.0f}" for name in OVERHEAD) for chain in found["chains"]]
    return (
        "## Cost of a call\n\n"
        f"{found['fixed_us']:.0f} µs, and {found['per_tensor_us']:.2f} µs per watched tensor.\n\n"
        f"{table([*OVERHEAD.values()], lines)}"
    )


def tuning(found: Mapping[str, Any]) -> str:
    """Seconds and memory of a tune."""
    if not found:
        return ""
    lines = [
        (
            model,
            f"{run['seconds']:.0f}",
            f"{run['model_bytes'] / 1e6:.0f}",
            f"{run['memory']:.2f}×",
            ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in run["stages"].items()),
        )
        for model, run in found.items()
    ]
    heads = ("model", "seconds", "model, MB", "peak memory, of the model", "stages")
    return f"## Tuning\n\n{table(heads, lines)}"


def machine_line(machine: Mapping[str, Any]) -> str:
    """The machine, the versions and the day, in one paragraph."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['isa']} ({', '.join(machine['extensions'])}); Python {machine['python']}, "
        f"{versions}; measured {machine['date']}."
    )


def table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; numbers stand at the right of their columns."""
    rule = "|".join("---" if head in TEXT else "---:" for head in heads)
    body = [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines]
    return "\n".join([f"| {' | '.join(heads)} |", f"|{rule}|", *body])


def milliseconds(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def error(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}".removeprefix("0")


def main() -> None:
    results = load()
    if not results["cells"]:
        raise SystemExit("nothing was measured yet\n  fix  python bench/compare.py --save")
    FILE.with_suffix(".md").write_text(page(results))
    README.write_text(filled(README.read_text(), readme_block(results)))


if __name__ == "__main__":
    main()
