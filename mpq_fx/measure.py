"""binding -> tables: what each site reads, what each choice costs in error, milliseconds and
bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from mpq_fx.activation_memory import contenders
from mpq_fx.binding import Binding
from mpq_fx.clock import Clock
from mpq_fx.config import Config
from mpq_fx.errors import CalibrationError, WeightError
from mpq_fx.facts import Choice, Live, Site, Table
from mpq_fx.formats import format_named
from mpq_fx.graph import kind_of
from mpq_fx.identity import identity_of
from mpq_fx.passes import METRICS, target_named
from mpq_fx.passes.allocate.problem import ERROR, NOISE
from mpq_fx.passes.analyze.activation_memory import live_sets
from mpq_fx.passes.analyze.cost import sizes
from mpq_fx.passes.analyze.metric import LossMetric, Metric, Task
from mpq_fx.passes.analyze.observe import Observed, observe, static_scales
from mpq_fx.passes.analyze.propose import Proposal, check_globs, propose
from mpq_fx.passes.analyze.randomness import check_repeatable
from mpq_fx.passes.analyze.ranking import draw
from mpq_fx.passes.analyze.ranking import measured as errors_of
from mpq_fx.passes.analyze.replay import (
    Replayer,
    is_measurable,
    replayer,
    run_in,
    worst_error,
)
from mpq_fx.passes.analyze.sites import shared_weights
from mpq_fx.passes.analyze.trace import Trace, trace
from mpq_fx.passes.analyze.work import Work
from mpq_fx.passes.lower.target import Target, available
from mpq_fx.registry import bindings_under
from mpq_fx.shapes import Code, Timed, complete, mean_latency, shapes_of

if TYPE_CHECKING:
    from mpq_fx.compiler import Graph

Record = Sequence[Any]
T = TypeVar("T")
PLANS = 4  # random ones that show whether a table of zeros is true
ERROR_TABLE = 0.25  # share of the time budget after which no further call is measured


@dataclass(frozen=True)
class Parts(Generic[T]):
    """The recorded calls, split: static ranges from `fit`, choices from `choose`, the error that is
    reported from `report`; with fewer than three calls the parts overlap and the plan says so."""

    fit: tuple[T, ...]
    choose: tuple[T, ...]
    report: tuple[T, ...]


@dataclass(frozen=True)
class Measured:
    """Everything the search needs; units are the names of sites in the model."""

    target: Target
    sites: tuple[Site, ...]  # with the sizes of a recorded call
    values: Mapping[str, Tensor]
    parts: Parts[Record]
    replay: Replayer
    proposal: Proposal
    observed: Mapping[str, Observed]
    references: tuple[list[Any], ...]  # float outputs of the choose part
    tolerance: float | None
    yardstick: float | None  # error of the whole model in bfloat16
    tables: Mapping[str, Table]
    float_ms: float | None  # of one call as Inductor compiles it; None where nothing is timed
    ties: tuple[tuple[str, ...], ...]
    excluded: frozenset[int]  # outputs that are caches
    live: tuple[Live, ...]  # values between ops: what is in memory at once, where it may be most


@dataclass(frozen=True)
class Seen:
    """What is known of a binding before any choice is measured."""

    target: Target
    values: Mapping[str, Tensor]
    parts: Parts[Record]
    replay: Replayer
    proposal: Proposal
    observed: Mapping[str, Observed]
    ties: tuple[tuple[str, ...], ...]


def measure(
    code: Code, config: Config, clock: Clock, others: Sequence[Code], work: Work
) -> Measured:
    """Observe, propose and measure one binding; `others` ran its sites in other shapes."""
    graph, binding = code.graph, code.binding
    seen = _seen(graph, binding, config, clock)
    replay, options, tied = seen.replay, seen.proposal.options, seen.ties
    with clock.stage("observe"):
        traced, references = _references(seen)
        check_outputs(references, graph.caches)
    with clock.stage("yardstick"):
        yardstick = bfloat16_error(graph, seen.values, seen.parts.choose, references)
    errors = _error_tables(graph, binding, config, clock, work, seen)
    with clock.stage("latency table"):
        sites = traced.concrete(graph.sites)
        live = contenders(live_sets(replay, traced), options)
        local = {name: site for site, name in binding.site_names.items()}
        timed = Timed(local, options, tied, seen.target, config.cache_dir)
        ms, float_ms = mean_latency(shapes_of((code, *others), clock), timed, clock)
    shared = shared_weights(graph.gm, sites)
    tables = {**errors, "latency": ms, **sizes(sites, options, shared)}
    found = (seen.target, sites, seen.values, seen.parts, replay, seen.proposal, seen.observed)
    limits = (references, tolerance_of(config, yardstick), yardstick)
    return Measured(*found, *limits, tables, float_ms, tied, graph.caches, live)


def assist(graph: Graph, binding: Binding, config: Config, work: Work) -> None:
    """This process's share of the error tables that another one plans with."""
    clock = Clock(config.time_budget)
    with torch.inference_mode(False), torch.no_grad(), torch._C._DisableAutocast():
        seen = _seen(graph, binding, config, clock)
        _error_tables(graph, binding, config, clock, work, seen)


def _seen(graph: Graph, binding: Binding, config: Config, clock: Clock) -> Seen:
    values = binding.values()
    kind = kind_of(values.values())
    target = available(target_named(config.target, config.device, kind), kind)
    check_finite(values, graph.paths)
    parts = split([complete(graph, record, values) for record in binding.records])
    replay = replayer(graph.gm, graph.sites, values)
    check_repeatable(replay, parts.fit[0], graph.caches)
    with clock.stage("observe"):
        observed = observe(replay, parts.fit)
        proposal = _proposal(graph, binding, config, target, observed)
        replay = replace(replay, scales=static_scales(observed, static_formats(proposal)))
    return Seen(target, values, parts, replay, proposal, observed, ties(graph, proposal))


def _references(seen: Seen) -> tuple[Trace, tuple[list[Any], ...]]:
    """The first call of the choose part step by step, and the outputs of all of them."""
    first, *rest = seen.parts.choose
    traced = trace(seen.replay, first)
    return traced, (traced.outputs, *(seen.replay.run(record, {}) for record in rest))


def _error_tables(
    graph: Graph, binding: Binding, config: Config, clock: Clock, work: Work, seen: Seen
) -> dict[str, Table]:
    """The metric's table, and of a loss the noise beside it; what is left out is noted."""
    task = Task(
        seen.replay,
        seen.proposal.options,
        seen.parts.choose,
        seen.ties,
        graph.caches,
        deadline=clock.deadline(ERROR_TABLE),
        losses=split(binding.losses).choose if binding.losses else (),
        work=work,
    )
    with clock.stage("error table"):
        work.begin(partial(identity_of, graph, binding, config, task))
        found = _tables_of(METRICS.named(config.sensitivity), task)
        error = found[ERROR]
        refuse_silent(error, task)  # measures plans, and so before the others rest
        work.finish()
    calls = len(task.records)
    if error.provenance["records"] < calls:
        clock.cut(f"errors measured on {error.provenance['records']} of {calls} calls")
    if guessed := error.provenance.get("estimated"):
        clock.cut(f"errors of {len(guessed)} sites are the median of other sites of their kind")
    return found


def _tables_of(metric: Metric, task: Task) -> dict[str, Table]:
    if isinstance(metric, LossMetric):
        error, noise = metric.measure(task)
        return {ERROR: error, NOISE: noise}
    return {ERROR: metric(task)}


def _proposal(
    graph: Graph, binding: Binding, config: Config, target: Target, seen: Mapping[str, Observed]
) -> Proposal:
    others = [name for b in bindings_under(config) for name in b.site_names.values()]
    check_globs(config.formats, [*binding.site_names.values()], others)
    return propose(
        graph.sites,
        target,
        names=binding.site_names,
        rules=config.formats,
        observed=frozenset(seen),
        calls=len(binding.records),
    )


def rerun(
    graph: Graph,
    binding: Binding,
    choices: Mapping[str, Choice],
    scales: Mapping[tuple[str, str], tuple[Tensor, Tensor]],
) -> Callable[[Record], list[Any]]:
    """Replays of another graph of the same model under choices and scales by name in the model."""
    names = binding.site_names
    local = {site: choices[name] for site, name in names.items()}
    known = {
        (s, fmt): v for s, name in names.items() for (n, fmt), v in scales.items() if n == name
    }
    replay = replayer(graph.gm, graph.sites, binding.values(), known)
    return lambda args: replay.run(args, local)


def split(records: Sequence[T]) -> Parts[T]:
    """Half of the calls to fit, a quarter each to choose and to report."""
    if not records:
        raise CalibrationError(
            "no usable calibration call was seen: all were empty, constant or not finite",
            fix="call the model on real inputs first",
        )
    quarter = max(1, len(records) // 4)
    fit = records[: max(1, len(records) - 2 * quarter)]
    choose, report = records[-2 * quarter : -quarter], records[-quarter:]
    return Parts(tuple(fit), tuple(choose or records[:1]), tuple(report))


def check_finite(values: Mapping[str, Tensor], paths: Mapping[str, str]) -> None:
    for name, tensor in values.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise WeightError(
                f"the weight {paths.get(name, name)} holds NaN or inf",
                fix="load a checkpoint whose weights are finite",
            )


def check_outputs(references: Sequence[Sequence[Any]], excluded: frozenset[int]) -> None:
    """Errors are relative to outputs: some number of theirs has to be finite and not zero."""
    outputs = [y for each in references for k, y in enumerate(each) if k not in excluded]
    if not any(bool((y.isfinite() & (y != 0)).any()) for y in outputs if is_measurable(y)):
        raise CalibrationError(
            "every output of the float model is zero or not finite on the recorded calls, so no "
            "error can be measured",
            fix="calibrate with inputs that the model responds to",
        )


def refuse_silent(table: Table, task: Task) -> None:
    """A table of zeros is true only where plans change nothing; else all would look harmless."""
    if task.count == 0 or any(table.values.values()) or any(table.pairs.values()):
        return
    task = replace(task, records=task.records[:1])
    largest = max(errors_of(task, [draw(task, seed) for seed in range(PLANS)]))
    if largest > 0.0:
        raise CalibrationError(
            f"{table.metric} finds no harm in any choice, though random plans have errors of up "
            f"to {largest:.3g}: it does not apply to these outputs, or gradients vanish (rounding "
            "and detach() in the model stop them)",
            fix='sensitivity="measured"',
        )


def static_formats(proposal: Proposal) -> list[Any]:
    names = {
        c.activation for kept in proposal.options.values() for c in kept if c.scaling == "static"
    }
    return [format_named(name) for name in sorted(names)]


def bfloat16_error(
    graph: Graph,
    values: Mapping[str, Tensor],
    records: Sequence[Record],
    references: Sequence[list[Any]],
) -> float:
    """Error of the whole model in bfloat16; of a 16-bit model, its own error against float32."""
    raw = replayer(graph.raw, (), values)
    halves = {site.dtype for site in graph.sites} - {"float32", "float64"}
    dtype = torch.float32 if halves else torch.bfloat16
    runs = (run_in(raw, record, dtype) for record in records)
    return worst_error(runs, references, graph.caches)


def tolerance_of(config: Config, yardstick: float) -> float | None:
    return yardstick if config.tolerance == "bf16" else config.tolerance  # type: ignore[return-value]


def ties(graph: Graph, proposal: Proposal) -> tuple[tuple[str, ...], ...]:
    """Linear sites that read one tensor take one choice, so that they run as one matmul."""
    groups: dict[str, list[str]] = {}
    for site in graph.sites:
        if site.group and site.op == "linear":
            groups.setdefault(f"{site.group} {proposal.options[site.name]}", []).append(site.name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def parse(proposal: Proposal, assignment: Mapping[str, str]) -> dict[str, Choice]:
    """{site: option name} -> {site: Choice}"""
    return {
        site: next(c for c in proposal.options[site] if c.name == name)
        for site, name in assignment.items()
    }
