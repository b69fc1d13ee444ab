"""binding -> tables: what each site reads, what each choice costs in error, milliseconds and
bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mpq_fx.binding import Binding, fresh
from mpq_fx.clock import Clock
from mpq_fx.config import Config
from mpq_fx.errors import CalibrationError, WeightError
from mpq_fx.facts import Choice, Site, Table
from mpq_fx.formats import format_named
from mpq_fx.identity import identity_of
from mpq_fx.passes import METRICS, target_named
from mpq_fx.passes.analyze.activation_memory import Live, live_sets
from mpq_fx.passes.analyze.cost import latency, sizes
from mpq_fx.passes.analyze.edges import find_edges
from mpq_fx.passes.analyze.metric import Task
from mpq_fx.passes.analyze.observe import Observed, observe, static_scales
from mpq_fx.passes.analyze.propose import Proposal, propose
from mpq_fx.passes.analyze.randomness import check_repeatable
from mpq_fx.passes.analyze.replay import Replayer, replayer, run_in, worst_error
from mpq_fx.passes.analyze.trace import Trace, trace
from mpq_fx.passes.analyze.work import Work
from mpq_fx.passes.lower.microbenchmark import milliseconds
from mpq_fx.passes.lower.target import Target, available

if TYPE_CHECKING:
    from mpq_fx.compiler import Graph

Record = Sequence[Any]
ERROR_TABLE = 0.25  # share of the time budget after which no further call is measured


@dataclass(frozen=True)
class Parts:
    """The recorded calls, split: static ranges from `fit`, choices from `choose`, the error that is
    reported from `report`; with fewer than three calls the parts overlap and the plan says so."""

    fit: tuple[Record, ...]
    choose: tuple[Record, ...]
    report: tuple[Record, ...]


@dataclass(frozen=True)
class Measured:
    """Everything the search needs; units are the names of sites in the model."""

    target: Target
    sites: tuple[Site, ...]  # with the sizes of a recorded call
    values: Mapping[str, Tensor]
    parts: Parts
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
    live: tuple[Live, ...]  # values between ops: what is in memory at once


@dataclass(frozen=True)
class Seen:
    """What is known of a binding before any choice is measured."""

    target: Target
    values: Mapping[str, Tensor]
    parts: Parts
    replay: Replayer
    proposal: Proposal
    observed: Mapping[str, Observed]
    ties: tuple[tuple[str, ...], ...]


def measure(
    graph: Graph,
    binding: Binding,
    config: Config,
    clock: Clock,
    run_float: Callable[..., Any],
    work: Work,
) -> Measured:
    """Observe, propose and measure one binding."""
    seen = _seen(graph, binding, config, clock)
    replay, options = seen.replay, seen.proposal.options
    with clock.stage("observe"):
        traced, references = _references(seen)
    with clock.stage("yardstick"):
        yardstick = bfloat16_error(graph, seen.values, seen.parts.choose, references)
    error = _error_table(graph, binding, config, clock, work, seen)
    with clock.stage("latency table"):
        sites, live = traced.concrete(graph.sites), live_sets(replay, traced)
        edges, folder = find_edges(graph.gm, graph.sites), config.cache_dir
        ms = latency(sites, options, seen.target, edges=edges, ties=seen.ties, cache_dir=folder)
        float_ms = _float_ms(seen.target, run_float, seen.parts.choose[0])
    tables = {"error": error, "latency": ms, **sizes(sites, options)}
    found = (seen.target, sites, seen.values, seen.parts, replay, seen.proposal, seen.observed)
    errors = (references, tolerance_of(config, yardstick), yardstick)
    return Measured(*found, *errors, tables, float_ms, seen.ties, graph.caches, live)


def assist(graph: Graph, binding: Binding, config: Config, work: Work) -> None:
    """This process's share of the error table that another one plans with."""
    clock = Clock(config.time_budget)
    with torch.inference_mode(False), torch.no_grad(), torch._C._DisableAutocast():
        seen = _seen(graph, binding, config, clock)
        _error_table(graph, binding, config, clock, work, seen)


def _seen(graph: Graph, binding: Binding, config: Config, clock: Clock) -> Seen:
    target, values = available(target_named(config.target)), binding.values()
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
    first, *others = seen.parts.choose
    traced = trace(seen.replay, first)
    return traced, (traced.outputs, *(seen.replay.run(record, {}) for record in others))


def _float_ms(target: Target, run_float: Callable[..., Any], record: Record) -> float | None:
    if not target.is_timed:
        return None
    args = fresh(record)
    return milliseconds(lambda: run_float(*args))


def _error_table(
    graph: Graph, binding: Binding, config: Config, clock: Clock, work: Work, seen: Seen
) -> Table:
    """The metric's table; calls and sites that there was no time for are noted."""
    metric, calls = METRICS.named(config.sensitivity), len(seen.parts.choose)
    options, deadline = seen.proposal.options, clock.deadline(ERROR_TABLE)
    choose, caches = seen.parts.choose, graph.caches
    task = Task(seen.replay, options, choose, seen.ties, caches, deadline, work)
    with clock.stage("error table"):
        work.begin(partial(identity_of, graph, binding, config, task))
        error = metric(task)
        work.finish()
    if error.provenance["records"] < calls:
        clock.cut(f"errors measured on {error.provenance['records']} of {calls} calls")
    if guessed := error.provenance.get("estimated"):
        clock.cut(f"errors of {len(guessed)} sites are the median of other sites of their kind")
    return error


def _proposal(
    graph: Graph, binding: Binding, config: Config, target: Target, seen: Mapping[str, Observed]
) -> Proposal:
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


def split(records: Sequence[Record]) -> Parts:
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


def complete(graph: Graph, record: Record, values: Mapping[str, Tensor]) -> Record:
    """A recorded call with the present parameters put back in their places."""
    return tuple(
        values[graph.names[k]] if k in graph.parameters else x for k, x in enumerate(record)
    )


def check_finite(values: Mapping[str, Tensor], paths: Mapping[str, str]) -> None:
    for name, tensor in values.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise WeightError(
                f"the weight {paths.get(name, name)} holds NaN or inf",
                fix="load a checkpoint whose weights are finite",
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
