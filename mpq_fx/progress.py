"""The bar that long work shows, and that a library is quiet about unless asked"""

from __future__ import annotations

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


def progress_bar(is_shown: bool) -> Progress:
    """A bar that vanishes when the work is done; one that is not shown costs nothing."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, transient=True, disable=not is_shown)
