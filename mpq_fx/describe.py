"""what was measured, found and settled -> the Plan: a ledger that accounts for every site"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch

from mpq_fx.activation_memory import peak
from mpq_fx.binding import Binding, fresh
from mpq_fx.build import caller
from mpq_fx.clock import Clock
from mpq_fx.config import Config
from mpq_fx.facts import Live, Plan, Row, Site, Table
from mpq_fx.measure import Measured, Parts, parse
from mpq_fx.passes.analyze.replay import worst_error
from mpq_fx.remeasured import PREDICTED
from mpq_fx.resolve import OBJECTIVES, point_of, solver_facts, trade_offs
from mpq_fx.search import replayed_error
from mpq_fx.settle import Settled

if TYPE_CHECKING:
    from mpq_fx.compiler import Graph

FRONTIER_POINTS = 7
FRONTIER_SECONDS = 1.0
FRONTIER_MEASURED = 1.0  # share of the time budget after which points are predicted only
FLOAT = "float"  # the user's own model, among the names of variants


def describe(
    graph: Graph,
    binding: Binding,
    measured: Measured,
    settled: Settled,
    config: Config,
    clock: Clock,
) -> Plan:
    """Everything a reader, a second process or a new budget needs to know of one binding."""
    names, winner = binding.site_names, settled.winner
    choices = parse(measured.proposal, winner.assignment)
    tables = {name: _renamed(table, names) for name, table in measured.tables.items()}
    error = _reported_error(graph, measured, settled)
    plan = Plan(
        choices={names[site]: choice for site, choice in choices.items()},
        ledger=tuple(_row(s, measured, settled, names) for s in measured.sites),
        target=measured.target.name,
        error=error,
        tolerance=measured.tolerance,
        objective=config.objective,
        latency_ms={name: t.median for name, t in settled.timings.items()},
        activation_bytes=_activation_bytes(measured, settled),
        errors=settled.errors,
        winner=winner.name,
        budgets=settled.found.budgets,
        baseline=settled.found.baseline,
        tables=tables,
        ties=tuple(tuple(names[s] for s in tie) for tie in measured.ties),
        live=tuple(_live_in(found, names) for found in measured.live),
        error_scale=settled.found.candidate.scale or 1.0,
        solver=solver_facts(settled.found.candidate.solution),
        timings=dict(clock.timings),
        fingerprint=fingerprint(measured.sites, names),
        provenance=provenance(measured),
        notes=_notes(graph, measured, settled, config, clock, error),
        tensors=_scales(measured, names),
    )
    with clock.stage("frontier"):
        points = tuple(_points(plan, measured, names, clock))
    return replace(plan, points=points, timings=dict(clock.timings))


def _points(
    plan: Plan, measured: Measured, names: Mapping[str, str], clock: Clock
) -> Iterator[dict[str, Any]]:
    """Trade-offs of latency and of size against error; while there is time each is also replayed
    on the report part: `measured` beside the predicted `error`.
    """
    once = replace(measured, replay=replace(measured.replay, caches=False))  # in memory at once
    report = measured.parts.report
    references = [once.replay.run(record, {}) for record in report]
    for resource in OBJECTIVES:
        for found in trade_offs(plan, resource, FRONTIER_POINTS, time_limit=FRONTIER_SECONDS):
            point = point_of(plan, resource, found)
            if not clock.is_past(FRONTIER_MEASURED):
                local = {
                    site: found.assignment[name]
                    for site, name in names.items()
                    if name in found.assignment
                }
                point["measured"] = replayed_error(once, local, report, references)
            yield point


def fingerprint(sites: tuple[Site, ...], names: Mapping[str, str]) -> dict[str, Any]:
    """What a model must have for a plan to be its own: sites, weight shapes, dtypes."""
    return {
        "sites": {
            names[s.name]: {"op": s.op, "weight_shape": list(s.weight_shape), "dtype": s.dtype}
            for s in sites
        }
    }


def provenance(measured: Measured) -> dict[str, Any]:
    """Versions and device: `install_plan` warns where those differ that the numbers hang on."""
    packages = {}
    for name in ("mpq-fx", "torch", "ortools"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "packages": packages,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "target": dict(measured.target.facts()),
        "calls": {part: len(getattr(measured.parts, part)) for part in ("fit", "choose", "report")},
    }


def _row(site: Site, measured: Measured, settled: Settled, names: Mapping[str, str]) -> Row:
    options, tables = measured.proposal.options[site.name], measured.tables
    choice, first = settled.winner.assignment[site.name], options[0].name
    power = tables["error"].values.get((site.name, choice), 0.0)
    ms, lowered = tables["latency"].values, settled.winner.lowered
    return Row(
        site=_named(site, names),
        choice=choice,
        reason=_reason(site, choice, measured),
        refusals={**measured.proposal.refusals[site.name], **lowered.refusals.get(site.name, {})},
        kernel=lowered.kernels.get(site.name, "inductor"),
        mode=settled.winner.mode,
        activation=measured.observed[site.name].facts if site.name in measured.observed else {},
        predicted_error=max(power, 0.0) ** 0.5,
        ms_before=ms[site.name, first],
        ms_after=ms[site.name, choice],
        weight_bytes=int(tables["size"].values[site.name, choice]),
    )


def _named(site: Site, names: Mapping[str, str]) -> Site:
    return replace(site, name=names[site.name])


def _reason(site: Site, choice: str, measured: Measured) -> str:
    """Why a site stayed as it was."""
    options = measured.proposal.options[site.name]
    if choice != options[0].name:
        return ""
    if len(options) == 1:
        return "no other choice is possible here"
    ms = measured.tables["latency"].values
    if all(ms[site.name, c.name] >= ms[site.name, choice] for c in options[1:]):
        return "float is the fastest here"
    return "the error is better spent elsewhere"


def _reported_error(graph: Graph, measured: Measured, settled: Settled) -> float:
    """The error of what runs, on calls that chose nothing."""
    if settled.winner.installed is None:
        return 0.0
    installed, records = settled.winner.installed, measured.parts.report
    runs = (caller(installed, fresh(record))() for record in records)
    references = (measured.replay.run(record, {}) for record in records)
    return worst_error(runs, references, measured.excluded)


def _notes(
    graph: Graph,
    measured: Measured,
    settled: Settled,
    config: Config,
    clock: Clock,
    error: float,
) -> tuple[str, ...]:
    notes = list(clock.notes)
    if measured.target.predicted:
        notes.append(f"{PREDICTED} {measured.target.predicted}, not measured")
    if graph.caches:
        notes.append(f"outputs {sorted(graph.caches)} are caches and not part of the error")
    notes += _few_calls(measured.parts)
    if measured.tolerance is not None and error > measured.tolerance:
        notes.append(
            f"the error on the calls kept for the report is {error:.3g}, above the "
            f"{measured.tolerance:.3g} that the plan keeps on those it was chosen on"
        )
    shapes = measured.tables["latency"].provenance["shapes"]
    if shapes > 1:
        notes.append(f"latency of layers is the mean over the calls seen, in {shapes} shapes")
    notes += _missed_latency(settled) if shapes == 1 else []
    if settled.winner.label != "plan":
        better = "nearer to float" if config.objective == "error" else "at least 2 % faster"
        notes.append(f"{settled.winner.name!r} was {better} than the plan, so it runs")
    return tuple(notes)


def _few_calls(parts: Parts) -> list[str]:
    """Parts that overlap, since there were fewer distinct calls than parts."""
    records = (*parts.fit, *parts.choose, *parts.report)
    distinct = len({id(record) for record in records})
    if distinct == len(records):
        return []
    if distinct == 1:
        return [
            "only 1 distinct calibration call: the parts to fit, choose and report overlap, and "
            "the error is of the call that the plan was chosen on"
        ]
    return [f"only {distinct} distinct calibration calls: the parts to fit and choose overlap"]


def _missed_latency(settled: Settled) -> list[str]:
    """Layers timed alone may promise a latency that the whole, raced, does not keep."""
    limit = settled.found.budgets.get("max_latency")
    took = settled.timings.get(settled.winner.name)
    if limit is None or took is None or took.median <= limit:
        return []
    return [
        f"a call takes {took.median:.3g} ms, above max_latency={limit:.3g}: layers timed alone "
        f"promised less; max_latency={0.95 * limit**2 / took.median:.2g} asks for more"
    ]


def _activation_bytes(measured: Measured, settled: Settled) -> dict[str, float]:
    """Peak bytes between the ops of one call: of the float model, and of every variant."""
    found = {FLOAT: float(peak(measured.live, {}))}
    for variant in settled.variants.values():
        choices = parse(measured.proposal, variant.assignment)
        found[variant.name] = float(peak(measured.live, choices))
    return found


def _renamed(table: Table, names: Mapping[str, str]) -> Table:
    def rename(values: Mapping[Any, float]) -> dict[Any, float]:
        return {(names[key[0]], *key[1:]): value for key, value in values.items()}

    pairs = {(names[u], c, names[v], d): ms for (u, c, v, d), ms in table.pairs.items()}
    found = {"values": rename(table.values), "spread": rename(table.spread), "pairs": pairs}
    return replace(table, **found, others=())  # which served the search and no further


def _live_in(live: Live, names: Mapping[str, str]) -> Live:
    return tuple(replace(v, deciding=tuple(sorted(names[s] for s in v.deciding))) for v in live)


def _scales(measured: Measured, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Static scales and zero points, so that a second process needs no calibration."""
    found = {}
    for (site, fmt), (scale, zero) in measured.replay.scales.items():
        found[f"{names[site]}|{fmt}|scale"] = scale
        found[f"{names[site]}|{fmt}|zero"] = zero
    return found
