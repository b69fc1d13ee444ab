"""batches -> plan: observe on them, solve every graph, and hold the user's metric where there is
one
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from mpq_fx.backend import compile_apart
from mpq_fx.batch import call, inputs_of
from mpq_fx.binding import Binding
from mpq_fx.checkpoint import Journal
from mpq_fx.clock import ANNOUNCE
from mpq_fx.compiler import check_names
from mpq_fx.config import Config
from mpq_fx.errors import CalibrationError, ConfigError, InfeasibleError
from mpq_fx.facts import Choice, Plan
from mpq_fx.install import install_plan
from mpq_fx.lifecycle import LIFECYCLES, Lifecycle
from mpq_fx.loss import Loss, Source
from mpq_fx.measure import assist, rerun
from mpq_fx.merged import distinct, merged
from mpq_fx.processes import Processes, together
from mpq_fx.progress import progress_bar
from mpq_fx.registry import ROOTS, bindings_of
from mpq_fx.search import Judge
from mpq_fx.shapes import Code
from mpq_fx.sharing import Sharing

log = logging.getLogger("mpq_fx")
Metric = Callable[[torch.nn.Module], Any]
LEAST_WAIT = 600.0  # seconds that a process is waited for, beside twice the time budget
UNLIMITED = 1 << 30  # calibration calls that no caller reaches: `tune` decides when to solve


def tune_model(  # noqa: PLR0913 -- what a user may say
    model: torch.nn.Module,
    batches: Sequence[Any],
    *,
    metric: Metric | None,
    max_drop: float | None,
    loss: Loss | None,
    config: Config,
    progress: bool,
    checkpoint: str | Path | None,
    alone: bool,
) -> Plan:
    """See mpq_fx.tune."""
    limit = LEAST_WAIT + 2 * config.time_budget
    with together(limit, alone=alone) as processes, ExitStack() as on:
        _check(model, batches, metric, max_drop)
        observing = _observing(config, processes, has_loss=loss is not None)
        check_names(observing)
        is_first = processes.rank == 0
        journal = Journal(checkpoint) if checkpoint is not None and is_first else None
        if journal is not None:
            on.callback(journal.close)
        ROOTS.add(model)
        compiled = compile_apart(model, config=observing)
        on.enter_context(_forgotten(observing))
        bar = on.enter_context(progress_bar(progress and is_first))
        # What is compiled in inference mode runs in no other; a loss needs gradients later.
        on.enter_context(torch.inference_mode() if loss is None else torch.no_grad())
        source = Source(loss, model, compiled, batches) if loss else None
        for index, batch in enumerate(bar.track(batches, description="observing")):
            _observe(compiled, index, batch, source, lambda: _own(model, observing))
        standard = _Standard(compiled, model, observing, metric, max_drop) if metric else None
        team = _Team(processes, journal, source, bar)
        return team.lead(model, observing, standard) if is_first else team.follow(model, observing)


def _observing(config: Config, processes: Processes, *, has_loss: bool) -> Config:
    """`tune` decides when to solve; of several processes none goes on alone after an error."""
    if config.plan is not None:
        raise ConfigError(
            "tune makes a plan, and the config names one already",
            fix="mpq_fx.apply(model, plan) runs it; mpq_fx.Config(...) without plan makes another",
        )
    on_error = config.on_error if processes.size == 1 else "raise"
    return replace(config, calibration_calls=UNLIMITED, loss=has_loss, on_error=on_error)


@dataclass(frozen=True)
class _Team:
    """The first process leads: it says which graph is next, and in the end which plan it found."""

    processes: Processes
    journal: Journal | None
    source: Source | None  # of the user's loss
    bar: Progress

    def lead(self, model: torch.nn.Module, config: Config, standard: _Standard | None) -> Plan:
        """Every graph planned: its error table by all processes, what follows by this one."""
        self._meet(model, config)
        if standard:
            standard.reach()
        found = _own(model, config)
        if self.source is not None:
            self.source.hand_over(found)
        for k, (lifecycle, binding) in enumerate(_announced(self.bar, found)):
            if not _is_covered(binding, found):
                judge = standard.judge(binding) if standard else None
                work = Sharing(self.processes, self.journal, k)
                self.processes.awaited(k)
                lifecycle.finalize(binding, judge, _other_shapes(binding, found), work)
        if standard:
            standard.verify(found)
        return self.processes.awaited(_planned(model, found))

    def follow(self, model: torch.nn.Module, config: Config) -> Plan:
        """A share of every error table, then the plan."""
        self._meet(model, config)
        found = _own(model, config)
        if self.source is not None:
            self.source.hand_over(found)
        while isinstance(told := self.processes.awaited(), int):
            lifecycle, binding = found[told]
            assist(lifecycle.graph, binding, config, Sharing(self.processes, None, told))
        return told

    def _meet(self, model: torch.nn.Module, config: Config) -> None:
        """All processes have captured the same graphs; each knows them by their place."""
        names = [sorted(binding.site_names.values()) for _, binding in _own(model, config)]
        graphs = {f"layers of graph {k}": " ".join(layers) for k, layers in enumerate(names)}
        self.processes.agree({"graphs": graphs})
        self.processes.rest()


def _planned(model: torch.nn.Module, found: Sequence[tuple[Lifecycle, Binding]]) -> Plan:
    plans = distinct(binding.plan for _, binding in found)
    if not plans:
        reasons = sorted({b.reason for _, b in found}) or ["no graph with a site was captured"]
        raise CalibrationError(
            f"{type(model).__name__} cannot be planned: {'; '.join(reasons)}",
            fix='try torch.compile(model, backend="mpq") and mpq_fx.explain',
        )
    return merged(plans)


def _observe(
    compiled: Any,
    index: int,
    batch: Any,
    source: Source | None,
    own: Callable[[], Sequence[tuple[Lifecycle, Binding]]],
) -> None:
    """Call the model with a batch; with a loss, see what it says and which graph ran."""
    if source is None:
        call(compiled, batch)
    else:
        source.note(index, call(compiled, inputs_of(source.model, batch)), own())


def _announced(
    bar: Progress, found: Sequence[tuple[Lifecycle, Binding]]
) -> Iterator[tuple[Lifecycle, Binding]]:
    """One graph after the other; meanwhile the bar tells which stage it is at."""
    task = bar.add_task("planning", total=len(found))

    def say(stage: str) -> None:
        bar.update(task, description=f"planning: {stage}")

    token = ANNOUNCE.set(say)
    try:
        for each in found:
            yield each
            bar.advance(task)
    finally:
        ANNOUNCE.reset(token)


@dataclass(frozen=True)
class _Standard:
    """The user's metric, its value on the float model, and the largest drop."""

    compiled: Any
    model: torch.nn.Module
    config: Config
    metric: Metric
    max_drop: float | None

    def reach(self) -> None:
        """Compile every graph that the metric calls (its batches may have another size).

        Nothing of the metric's data becomes calibration data.
        """
        own = [binding for _, binding in _own(self.model, self.config)]
        before = {id(b): (list(b.records), b.shapes.copy()) for b in own}
        _measured(self.metric, self.compiled)
        for _, binding in _own(self.model, self.config):
            binding.records[:], binding.shapes = before.get(id(binding), ([], Counter()))

    def judge(self, binding: Binding) -> Judge:
        base, count = _measured(self.metric, self.model)
        limit = self.max_drop or 0.0
        if base == 0.0 or not math.isfinite(base):
            raise CalibrationError(
                f"the metric of the float model is {base:g}, and max_drop is a share of it",
                fix="a metric that is finite and not 0 there, such as an accuracy",
            )
        if count is not None and limit < 1 / count:
            raise ConfigError(
                f"max_drop={limit:g} cannot be seen on {count} examples: "
                f"one of them is {1 / count:.2g}",
                fix=f"max_drop={1 / count:.2g}, or more examples",
            )

        def drop(replay: Any, choices: Mapping[str, Choice]) -> float:
            runners: list[Any] = []
            value = base
            # A call may compile one more graph, which ran in float then: measure again.
            while len(runners) < len(now := list(self._runners(binding, replay, choices))):
                runners = now
                with ExitStack() as trials:
                    for other, run in runners:
                        trials.enter_context(_trial(other, run))
                    value, _ = _measured(self.metric, self.compiled)
            return (base - value) / max(abs(base), 1e-12)

        return Judge(drop, limit)

    def _runners(
        self, binding: Binding, replay: Any, choices: Mapping[str, Choice]
    ) -> Iterator[tuple[Binding, Callable[..., Any]]]:
        """The binding under test and the other shapes of its code, all in the same choices."""
        yield binding, lambda args: replay.run(args, choices)
        names = binding.site_names
        named = {names[site]: choice for site, choice in choices.items()}
        scales = {(names[site], fmt): value for (site, fmt), value in replay.scales.items()}
        for lifecycle, other in _own(self.model, self.config):
            if other is not binding and set(other.site_names.values()) <= set(named):
                yield other, rerun(lifecycle.graph, other, named, scales)

    def verify(self, found: Sequence[tuple[Lifecycle, Binding]]) -> None:
        """The metric of what is installed, kernels and all, in every shape."""
        plans = distinct(binding.plan for _, binding in found)
        for lifecycle, binding in found:
            names = set(binding.site_names.values())
            plan = next((p for p in plans if names <= set(p.choices)), None)
            if binding.plan is None and plan is not None:
                install_plan(lifecycle.graph, binding, plan, self.config)
        base, _ = _measured(self.metric, self.model)
        value, _ = _measured(self.metric, self.compiled)
        drop, limit = (base - value) / max(abs(base), 1e-12), self.max_drop or 0.0
        if drop > limit:
            raise InfeasibleError(
                f"the compiled plan loses {drop:.3g} of the metric "
                f"({base:.6g} -> {value:.6g}), more than max_drop={limit:g}",
                fix=f"max_drop={drop:.3g}",
            )


@contextmanager
def _forgotten(config: Config) -> Iterator[None]:
    """Graphs compiled for one tune are no part of the model afterwards."""
    try:
        yield
    finally:
        for lifecycle in [lc for lc in LIFECYCLES if lc.config is config]:
            LIFECYCLES.discard(lifecycle)
            lifecycle.bindings.clear()  # Dynamo keeps the graphs; their constants are let go


@contextmanager
def _trial(binding: Binding, run: Callable[..., Any]) -> Iterator[None]:
    """Calls of one binding answered by a replay of the plan under test."""
    binding.trial = run
    try:
        yield
    finally:
        binding.trial = None


def _measured(metric: Metric, model: Any) -> tuple[float, int | None]:
    """A metric gives its value, or (value, number of examples)."""
    with torch.inference_mode():
        found = metric(model)
    value, count = found if isinstance(found, tuple) else (found, None)
    return float(value), count


def _own(model: torch.nn.Module, config: Config) -> list[tuple[Lifecycle, Binding]]:
    """The graphs that this tune observed, the best observed first."""
    found = [(lc, b) for lc, b in bindings_of(model) if lc.config is config and lc.sites]
    return sorted(found, key=lambda pair: -len(pair[1].records))


def _other_shapes(binding: Binding, found: Sequence[tuple[Lifecycle, Binding]]) -> tuple[Code, ...]:
    """Observed graphs that will run in the plan of this one."""
    names = set(binding.site_names.values())
    return tuple(
        Code(lifecycle.graph, other, lifecycle.run_float)
        for lifecycle, other in found
        if other is not binding and other.records and set(other.site_names.values()) <= names
    )


def _is_covered(binding: Binding, found: Sequence[tuple[Lifecycle, Binding]]) -> bool:
    """Did an earlier graph (another shape of the same code) plan all the sites of this one?"""
    names = set(binding.site_names.values())
    return any(
        other.plan is not None and names <= set(other.plan.choices)
        for _, other in found
        if other is not binding
    )


def _check(
    model: torch.nn.Module, batches: Sequence[Any], metric: Metric | None, max_drop: float | None
) -> None:
    if not isinstance(model, torch.nn.Module):
        what = f"tune plans a torch.nn.Module, and was given a {type(model).__name__}"
        raise ConfigError(what, fix="make it the forward of a Module that owns its weights")
    if not batches:
        raise CalibrationError("tune got no batches", fix="mpq_fx.tune(model, [x1, x2, ...])")
    if model.training:
        raise ConfigError("the model is in training mode", fix="mpq_fx.tune(model.eval(), batches)")
    if (metric is None) != (max_drop is None):
        raise ConfigError(
            "metric and max_drop belong together",
            fix="mpq_fx.tune(model, batches, metric=f, max_drop=0.01)",
        )
    if max_drop is not None and not 0 <= max_drop < 1:
        raise ConfigError(
            f"max_drop={max_drop} is not a share of the metric between 0 and 1", fix="max_drop=0.01"
        )
