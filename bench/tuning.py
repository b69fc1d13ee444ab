"""A tune of one model: seconds, and peak memory as a multiple of the model's own.

    python bench/tuning.py bert-base [--save]

Memory is the largest resident set while `tune` runs, less what the process held before it; the
model counts once, so 1x would be a tune that needs nothing besides.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from models import MODELS, SIZES, build
from results import add_section, check_machine, load, parser
from variants import CALIBRATION_CALLS

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")  # "5" sets the peak back to the present


def measure(model: str, size: str = "full", **wishes: Any) -> dict[str, Any]:
    """Seconds, bytes and what the tune found; only on Linux, which counts the peak."""
    import mpq_fx

    case = build(model, 1, size)
    own = sum(t.nbytes for t in (*case.model.parameters(), *case.model.buffers()))
    batches = case.calibration(CALIBRATION_CALLS)
    with tempfile.TemporaryDirectory() as folder:
        config = mpq_fx.Config(cache_dir=folder, **wishes)
        RESET.write_text("5")
        before, begin = resident("VmRSS"), time.perf_counter()
        plan = mpq_fx.tune(case.model, batches, config=config, progress=False)
        seconds = time.perf_counter() - begin
    extra = resident("VmHWM") - before
    return {
        "seconds": seconds,
        "model_bytes": own,
        "extra_bytes": extra,
        "memory": 1 + extra / own,
        "stages": dict(plan.timings),
        "winner": plan.winner,
    }


def resident(field: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS now, VmHWM at the peak."""
    match = re.search(rf"^{field}:\s+(\d+) kB", STATUS.read_text(), re.M)
    assert match, field
    return int(match[1]) * 1024


def main(arguments: Sequence[str] | None = None) -> None:
    asked = parser(__doc__)
    asked.add_argument("model", nargs="?", choices=MODELS, default="bert-base")
    asked.add_argument("--size", choices=SIZES, default=SIZES[0])
    options = asked.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.save:
        check_machine(options.threads)
    found = measure(options.model, options.size)
    print(
        f"{options.model}: {found['seconds']:.0f} s, {found['memory']:.2f}x the model's "
        f"{found['model_bytes'] / 1e6:.0f} MB, {found['winner']} installed\n  "
        + ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in found["stages"].items())
    )
    if options.save:
        section = {**load()["tuning"], options.model: found}
        add_section("tuning", section, threads=options.threads)


if __name__ == "__main__":
    main()
