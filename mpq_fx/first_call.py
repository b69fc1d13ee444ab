"""a compiled plan that nobody measured  ->  compared with its own operations on the first call

In `tune`, and where calls were observed, the error of what was compiled is measured before it may
run.  A plan from a file, or in a new shape, is compiled without data: its first call also runs the
lowered graph operation by operation.  Where the two differ by more than rounding, a compiler went
wrong in this mode, and the plan is built again in the target's plainest one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from mpq_fx.binding import Binding, Installed, fresh
from mpq_fx.build import WRONG
from mpq_fx.errors import MpqError
from mpq_fx.facts import Plan
from mpq_fx.passes.analyze.replay import output_error

log = logging.getLogger("mpq_fx")
ROUNDING = 2**-8  # of bfloat16: what a plan that is nearly exact may differ by


def install_compared(
    binding: Binding, plan: Plan, installed: Installed, mode: str, rebuild: Callable[[], Installed]
) -> None:
    """Install a plan whose first call decides between `installed` and what `rebuild` gives."""
    limit = WRONG * max(plan.error or 0.0, ROUNDING)

    def run(*args: Any) -> Any:
        with binding.lock, torch.inference_mode(False), torch.no_grad():
            if binding.installed is first:
                error = difference(installed, args)
                if error > limit:
                    log.warning("%s; it is compiled without", _went_wrong(mode, error))
                    _refuse_released(binding, mode, error)
                binding.install(installed if error <= limit else rebuild(), plan)
        chosen, given = binding.installed, dict(zip(installed.live, args, strict=False))
        assert chosen is not None
        return chosen.run(*[given[k] for k in chosen.live], *chosen.passed)

    first = replace(installed, run=run)
    binding.install(first, plan)


def difference(installed: Installed, args: Sequence[Any]) -> float:
    """Relative RMS between the compiled graph and the same graph run by PyTorch."""
    return output_error(installed.run(*fresh(args)), installed.constants(*fresh(args)))


def _went_wrong(mode: str, error: float) -> str:
    return f"with {mode} the plan computes something else than its operations do: {error:.3g}"


def _refuse_released(binding: Binding, mode: str, error: float) -> None:
    if binding.released:
        raise MpqError(
            f"{_went_wrong(mode, error)}, and the float weights to build it again were freed",
            fix="apply the plan without release=True",
        )
