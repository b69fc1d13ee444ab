"""`mpq demo`: three nets that have learned something, planned and measured on this machine."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from mpq_fx.demo.variants import Measurement

OUTPUT = Path("mpq-demo")
TOLERANCES: tuple[str | float, ...] = ("bf16", 0.02, 0.05)  # "bf16" is the default
QUICK = ("cnn",)
NOTE = (
    "error: relative RMS of the outputs against eager float32, on inputs that no plan has seen.\n"
    "ms: median of one call, all variants of a net timed in turn.  MACs in: what a plan chose."
)


def main(*, progress: bool = True, output: Path = OUTPUT, quick: bool = False) -> None:
    """Plan and measure each net, print a table for it, and write an HTML page for each plan.

    `quick` takes one net on the reference target: it checks that everything runs, in seconds, and
    measures no time.  Raises UnsupportedError where the test extra is not installed.
    """
    from mpq_fx.demo.nets import SUBJECTS
    from mpq_fx.demo.table import machine

    console = Console(width=None if Console().is_terminal else 140, highlight=False)
    console.print(f"on {machine()}\n{NOTE}\n", markup=False)
    for name in QUICK if quick else SUBJECTS:
        _show(name, console, progress=progress, output=output, quick=quick)


def _show(name: str, console: Console, *, progress: bool, output: Path, quick: bool) -> None:
    from mpq_fx.demo.nets import SUBJECTS
    from mpq_fx.demo.table import table, written
    from mpq_fx.demo.variants import measure

    with _status(console, progress, f"{name}: loading or training") as say, _quiet():
        subject = SUBJECTS[name]()
        found = measure(
            subject,
            _tolerances(quick),
            target="reference" if quick else "auto",
            say=lambda text: say(f"{name}: {text}"),
        )
    console.print(table(subject.title, found))
    _print_plan(found, console)
    console.print(f"reports: {', '.join(map(str, written(name, found, output)))}\n", markup=False)


def _print_plan(found: Sequence[Measurement], console: Console) -> None:
    """Every site of the plan at the default tolerance; the others are in the pages."""
    from mpq_fx.report_text import rendered

    report = next(m.report for m in found if m.report is not None)
    console.print(rendered(replace(report, dynamo={}), console.width))


def _tolerances(quick: bool) -> Sequence[str | float]:
    return TOLERANCES[:2] if quick else TOLERANCES


@contextlib.contextmanager
def _status(console: Console, progress: bool, text: str) -> Iterator[Callable[[str], None]]:
    """A line that says what is being done, on a terminal; nothing anywhere else."""
    if not (progress and console.is_terminal):
        yield lambda text: None
        return
    with console.status(text) as status:
        yield status.update


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Deprecations inside torch and transformers are nothing the reader of a demo can act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\b.*")
        yield
