"""capture -> canonicalize -> observe -> propose -> measure -> allocate -> rewrite -> lower -> run

`compile_graph` runs while Dynamo compiles; `optimize` when a binding has seen enough calls.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule

from mpq_fx.binding import Binding
from mpq_fx.capture import capture
from mpq_fx.clock import Clock
from mpq_fx.config import Config
from mpq_fx.describe import describe
from mpq_fx.dynamo import frame_root
from mpq_fx.errors import ConfigError, PlanError
from mpq_fx.facts import INDUCTOR, Plan, Site
from mpq_fx.graph import (
    arguments,
    clone,
    kind_of,
    mark_weights,
    output_of,
    placeholders,
    run_passes,
    value,
)
from mpq_fx.install import FLOAT_WINS, donor, install_plan, release
from mpq_fx.lifecycle import OBSERVING, Lifecycle
from mpq_fx.measure import measure
from mpq_fx.passes import METRICS, canonicalization, target_named
from mpq_fx.passes.allocate import SEARCHES, SOLVERS
from mpq_fx.passes.analyze.metric import LossMetric
from mpq_fx.passes.analyze.replay import is_measurable
from mpq_fx.passes.analyze.sites import find_sites
from mpq_fx.passes.analyze.work import Work
from mpq_fx.passes.lower.target import available
from mpq_fx.plan import load
from mpq_fx.registry import bindings_under, naming_root, site_names
from mpq_fx.search import Judge, search
from mpq_fx.settle import settle
from mpq_fx.shapes import Code

log = logging.getLogger("mpq_fx")
NO_ERROR = "no floating output, so the error of a plan cannot be measured"


@dataclass(frozen=True, eq=False)
class Graph:
    """One captured graph and what is known of it before any call."""

    gm: GraphModule  # canonical
    raw: GraphModule  # as captured: what `.bfloat16()` is measured on
    sites: tuple[Site, ...]
    names: tuple[str, ...]  # of the placeholders
    paths: dict[str, str]  # placeholder of a parameter or buffer -> its path in the frame
    parameters: tuple[int, ...]  # positions of parameters and of buffers nobody writes to
    caches: frozenset[int]  # outputs that are caches: not part of the error
    passes: tuple[tuple[str, int], ...]  # what canonicalization changed


def compile_graph(
    gm: GraphModule, example_inputs: Sequence[Any], config: Config
) -> Callable[..., Any]:
    """Float graph in; a callable out that observes, solves once and then runs mixed precision."""
    check_names(config)
    compile_float = partial(float_callable, gm, example_inputs, config)
    captured = capture(gm, example_inputs)
    if captured.refusal:
        log.warning("a graph stays in float: %s", captured.refusal)
        empty = empty_graph(gm, captured.parameters)
        return Lifecycle(empty, compile_float(), config, reason=captured.refusal)
    mark_weights(captured.gm, captured.parameters.keys() - set(captured.mutated))
    raw, _ = clone(captured.gm)
    changed = run_passes(captured.gm, canonicalization())
    names = tuple(node.name for node in placeholders(captured.gm))
    caches = cache_outputs(captured.gm)
    graph = Graph(
        captured.gm,
        raw,
        tuple(find_sites(captured.gm, captured.parameters)),
        names,
        dict(captured.parameters),
        tuple(
            k
            for k, name in enumerate(names)
            if name in captured.parameters and name not in captured.mutated
        ),
        caches,
        tuple(changed),
    )
    config = loaded(config)
    run_float = gm.forward if is_planned(graph, config) else compile_float()
    return Lifecycle(
        graph,
        run_float,
        config,
        optimize=partial(optimize, graph, run_float),
        welcome=partial(welcome, graph, weakly(frame_root())),
        reason="" if has_error(captured.gm, caches) else NO_ERROR,
    )


def optimize(  # noqa: PLR0913 -- what is known of one graph, and what `tune` adds
    graph: Graph,
    run_float: Callable[..., Any],
    binding: Binding,
    config: Config,
    judge: Judge | None = None,
    others: Sequence[Code] = (),
    work: Work | None = None,
) -> None:
    """Observed binding in; plan solved, verified and installed.

    With `judge` (in `tune`) the user's metric takes the place of the error in the bisection.  Calls
    of `others`, which run in the same plan in other shapes, count in its latency.  `work` says who
    measures the error table, and where it is kept.
    """
    clock = Clock(config.time_budget)
    with torch.inference_mode(False), torch.no_grad(), torch._C._DisableAutocast():
        # Tables of error, latency and bytes.
        code = Code(graph, binding, run_float)
        measured = measure(code, config, clock, others, work or Work())
        log.debug("measured in %s", clock.timings)
        if judge is not None:
            measured = replace(measured, tolerance=None)
        found = search(measured, config, clock, judge)  # CP-SAT + bisection on measured error
        settled = settle(graph, measured, found, config, clock, run_float, judge)  # never worse
        plan = describe(graph, binding, measured, settled, config, clock)
    if settled.winner.installed is None:
        binding.keep_float(FLOAT_WINS, plan)
    else:
        binding.install(settled.winner.installed, plan)


def welcome(
    graph: Graph,
    frame: Callable[[], torch.nn.Module | None],
    lifecycle: Lifecycle,
    binding: Binding,
) -> None:
    """A first call with new parameters: name the sites, and start from a plan where there
    is one.
    """
    config = lifecycle.config
    root = naming_root(binding, frame())
    if root is not None:
        binding.site_names = site_names(graph.sites, binding, root)
    plan = config.plan or donor(graph, binding, bindings_under(config))
    if not isinstance(plan, Plan) or binding.reason != OBSERVING:
        return
    try:
        install_plan(graph, binding, plan, config)
    except PlanError as error:
        if config.on_error == "raise":
            raise
        log.warning("staying in float: %s", error)
        binding.keep_float(error.what)
        return
    if config.release and binding.installed is not None:
        freed = release(binding)
        log.info("freed %.1f MB of float weights", freed / 1e6)


def weakly(module: torch.nn.Module | None) -> Callable[[], torch.nn.Module | None]:
    """The module while it lives: Dynamo keeps code longer than models."""
    return weakref.ref(module) if module is not None else lambda: None


def check_names(config: Config) -> None:
    """What plug-ins may add to is known by now: refused before any call is observed are unknown
    names, and a target that cannot run here, unless the model is to run on in float.
    """
    target = target_named(config.target, config.device)
    if config.on_error == "raise":
        available(target, target.tensors[0])
    check_loss(config)
    SOLVERS.named(config.solver)
    if reasons := "; ".join(SEARCHES.named(config.search).refuse(config)):
        raise ConfigError(f"search={config.search!r} {reasons}", fix='search="solver" does it all')


def check_loss(config: Config) -> None:
    """A loss is given if and only if the metric asks it."""
    is_asked = isinstance(METRICS.named(config.sensitivity), LossMetric)
    if is_asked and not config.loss:
        raise ConfigError(
            f"sensitivity={config.sensitivity!r} needs a loss, and none was given",
            fix="mpq_fx.tune(model, batches, loss=f), with f(output, batch) -> a scalar tensor",
        )
    if config.loss and not is_asked:
        raise ConfigError(
            f"a loss was given, and sensitivity={config.sensitivity!r} does not ask it",
            fix='mpq_fx.Config(sensitivity="interlayer_loss")',
        )


def loaded(config: Config) -> Config:
    """The same wishes, with the plan read from its file."""
    if config.plan is None or isinstance(config.plan, Plan):
        return config
    return replace(config, plan=load(str(config.plan)))


def is_planned(graph: Graph, config: Config) -> bool:
    """Will a plan run this graph, so that float is only for sizes that it was not compiled for?"""
    plan = config.plan
    if not isinstance(plan, Plan) or not graph.sites or config.on_error == "float":
        return False
    return all(row.mode != INDUCTOR for row in plan.ledger)


def float_callable(
    gm: GraphModule, example_inputs: Sequence[Any], config: Config
) -> Callable[..., Any]:
    """Inductor as the user would have it; eager where nothing is timed, which is not for speed."""
    if not target_named(config.target, config.device, kind_of(example_inputs)).is_timed:
        return gm.forward
    from torch._inductor.compile_fx import compile_fx

    compiled: Callable[..., Any] = compile_fx(clone(gm)[0], list(example_inputs))  # type: ignore[assignment]
    return compiled


def empty_graph(gm: GraphModule, paths: Mapping[str, str]) -> Graph:
    """The record of a graph that stays Dynamo's own."""
    names = tuple(node.name for node in placeholders(gm))
    owned = tuple(k for k, name in enumerate(names) if name in paths)
    return Graph(gm, gm, (), names, dict(paths), owned, frozenset(), ())


def has_error(gm: GraphModule, caches: frozenset[int]) -> bool:
    """Is there an output whose error can be measured: floating, and not a cache?"""
    results = enumerate(arguments(output_of(gm))[0])
    return any(is_measurable(value(n)) for k, n in results if k not in caches and n is not None)


def cache_outputs(gm: GraphModule) -> frozenset[int]:
    """Positions of outputs that an attention of the same graph reads: keys and values to be
    kept.
    """
    results = arguments(output_of(gm))[0]
    attention = torch.ops.aten.scaled_dot_product_attention.default
    read = {n for node in gm.graph.nodes if node.target is attention for n in node.args[1:3]}
    return frozenset(k for k, node in enumerate(results) if node in read)
