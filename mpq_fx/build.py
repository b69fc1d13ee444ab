"""graph + assignment -> Variant: rewritten, lowered, folded, compiled, and its error measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mpq_fx.binding import Installed, fresh
from mpq_fx.constant_pool import share
from mpq_fx.dynamo import one_compiles
from mpq_fx.facts import Choice
from mpq_fx.graph import clone, placeholders
from mpq_fx.measure import Measured, parse
from mpq_fx.passes.analyze.replay import Scales, worst_error
from mpq_fx.passes.lower.constants import fold_constants
from mpq_fx.passes.lower.layout import keep_output_layout
from mpq_fx.passes.lower.target import Lowered, Target
from mpq_fx.passes.rewrite import rewrite
from mpq_fx.sizes import size_guard
from mpq_fx.watch import stamp

if TYPE_CHECKING:
    from mpq_fx.compiler import Graph

WRONG = 3.0  # times what is allowed: a difference that rounding does not explain


@dataclass(frozen=True)
class Variant:
    """An assignment, compiled, with its error measured on what really runs.

    `installed` is None for the user's own float model under Inductor.
    """

    label: str  # "plan", "all bfloat16", …
    assignment: Mapping[str, str]
    installed: Installed | None
    lowered: Lowered
    error: float
    mode: str = ""  # how it was compiled: one of the target's modes

    @property
    def name(self) -> str:
        return f"{self.label}, {self.mode}" if self.mode not in ("", self.label) else self.label


def build(
    graph: Graph, measured: Measured, label: str, assignment: Mapping[str, str], mode: str = ""
) -> Variant:
    """Rewrite, lower, fold and compile one assignment; then measure what it really computes."""
    choices = parse(measured.proposal, assignment)
    measured.replay.forget(choices)  # room for the constants and the compiler
    installed, lowered = lower(
        graph, measured.target, measured.values, choices, measured.replay.scales, mode
    )
    runs = (caller(installed, fresh(record))() for record in measured.parts.choose)
    error = worst_error(runs, measured.references, measured.excluded)
    return Variant(label, assignment, installed, lowered, error, mode)


def lower(
    graph: Graph,
    target: Target,
    values: Mapping[str, torch.Tensor],
    choices: Mapping[str, Choice],
    scales: Scales,
    mode: str = "",
) -> tuple[Installed, Lowered]:
    """canonical graph + choices -> compiled callable over owned constants, and its callees."""
    gm, _ = clone(graph.gm)
    rewrite(gm, graph.sites, choices, beside(scales, values))
    lowered = target.lower(gm, mode)
    keep_output_layout(gm, graph.gm)
    parameters = {graph.names[k]: values[graph.names[k]] for k in graph.parameters}
    stamps = {name: stamp(x) for name, x in parameters.items()}  # before the contents are read
    folded = fold_constants(gm, parameters)
    share(folded, gm, parameters)
    inputs = [node.meta["val"] for node in placeholders(folded.gm)]
    with one_compiles(), size_guard(graph.gm) as accepts:
        compiled = target.compile(folded.gm, inputs, mode)
    live_names = tuple(graph.names[k] for k in folded.live)
    passed = tuple(getattr(folded.gm, name) for name in folded.passed)
    installed = Installed(
        compiled.run,
        folded.live,
        passed,
        folded.gm,
        live_names,
        compiled.derived,
        gm,
        folded.recipes,
        stamps,
        target.name,
        accepts,
    )
    return installed, lowered


def beside(scales: Scales, values: Mapping[str, torch.Tensor]) -> Scales:
    """Static scales on the device of the weights: a kernel cannot read numbers from another."""
    device = next((x.device for x in values.values()), torch.device("cpu"))
    return {key: (scale.to(device), zero.to(device)) for key, (scale, zero) in scales.items()}


def caller(installed: Installed, record: Sequence[Any]) -> Callable[[], Any]:
    """A call of a compiled plan on a recorded call; mutated inputs are copies, and written to."""
    args = [record[k] for k in installed.live]
    return lambda: installed.run(*args, *installed.passed)
