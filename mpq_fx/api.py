"""tune, pareto, apply, explain, finalize, refresh: what users call besides torch.compile."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mpq_fx.config import Config, wished
from mpq_fx.errors import CalibrationError, MpqError, WeightError
from mpq_fx.facts import Plan
from mpq_fx.registry import ROOTS, bindings_of, bypass, entries, root_of, totals

if TYPE_CHECKING:
    from mpq_fx.front import Front
    from mpq_fx.report import Report

log = logging.getLogger("mpq_fx")
Metric = Callable[[torch.nn.Module], float]
Loss = Callable[[Any, Any], Tensor]  # output, batch -> a scalar


def tune(  # noqa: PLR0913 -- what a user may say
    model: torch.nn.Module,
    batches: Iterable[Any],
    *,
    metric: Metric | None = None,
    max_drop: float | None = None,
    loss: Loss | None = None,
    config: Config | None = None,
    progress: bool = True,
    checkpoint: str | Path | None = None,
    alone: bool = False,
) -> Plan:
    """Batches in, plan out: observe the model on `batches`, solve, verify, and return the plan.

    A batch is a Tensor (model(x)), a tuple (model(*x)) or a dict (model(**x)); `mpq_fx.synthetic`
    makes some without data, and the plan then says so.  With `metric` (a function of a model,
    higher is better) the plan loses at most the share `max_drop` of the float model's value, which
    takes the place of the tolerance.  With `loss`, loss(output, batch) -> a scalar tensor,
    sensitivity="interlayer_loss" asks how much each choice raises it; what the forward does not
    take of a batch, such as labels, is left for the loss.  The model itself is left as it was.

    What is measured for the error table is kept in the file `checkpoint`, and a tune of the same
    model, data and options goes on with it.  In a process group of torch.distributed every process
    calls this alike and measures its share, unless `alone`; all of them get the plan of the first.
    Raises CalibrationError for no batch, for a loss that is not finite and for a model that is not
    deterministic, ConfigError for a loss that does not depend on the output, InfeasibleError for
    budgets that cannot be met, CheckpointError and ProcessError where a checkpoint or another
    process is of something else.
    """
    from mpq_fx.synthetic.origin import synthetic_facts, with_origins
    from mpq_fx.tuning import tune_model

    config, given = wished(config), list(batches)
    made_up = synthetic_facts(given)
    if made_up:
        log.warning("%s; compare the plan with float on a few real ones", made_up["note"])
    run = partial(tune_model, metric=metric, max_drop=max_drop, loss=loss, alone=alone)
    plan = run(model, given, config=config, progress=progress, checkpoint=checkpoint)
    return with_origins(plan, made_up)


def pareto(
    model: torch.nn.Module,
    batches: Iterable[Any],
    *,
    loss: Loss | None = None,
    config: Config | None = None,
    progress: bool = True,
    checkpoint: str | Path | None = None,
) -> Front:
    """Batches in, trade-offs out: error against latency, and error against size, in one tune.

    Each point holds what the tables predict of a plan, its error replayed on calls that chose
    nothing (`measured`, while the time budget lasts), and the options that lead there.  Points that
    another one of their resource beats in both are left out.  `front.plan_at(point)` is its plan.
    `checkpoint` is that of `tune`.
    """
    from mpq_fx.front import front_of

    plan = tune(model, batches, loss=loss, config=config, progress=progress, checkpoint=checkpoint)
    return front_of(plan)


def apply(
    model: torch.nn.Module,
    plan: Plan | str | Path,
    *,
    release: bool = False,
    config: Config | None = None,
) -> Any:
    """model + plan -> compiled model that starts without calibration.

    release=True frees the float weights on the first call: no refresh and no training after that.
    A plan with codes also fills a model on the meta device.  Raises PlanError for a plan with a
    layer that the model has not.
    """
    from mpq_fx.backend import compile_apart
    from mpq_fx.codes import materialize
    from mpq_fx.install import check_layers
    from mpq_fx.plan import load

    plan = plan if isinstance(plan, Plan) else load(plan)
    model = root_of(model)
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        materialize(model, plan)
    check_layers(plan, model)
    ROOTS.add(model)
    config = replace(wished(config), plan=plan, release=release)
    return compile_apart(model, config=config)


def explain(compiled: Any) -> Report:
    """What runs in which precision, why, what was gained and what more is possible."""
    from mpq_fx.dynamo import dynamo_facts
    from mpq_fx.report import report_of

    return report_of(entries(compiled), dynamo=dynamo_facts(), parameters=totals(compiled))


def finalize(compiled: Any) -> None:
    """End observing now: solve every graph of the model with the calls it has seen.

    A graph that cannot be planned keeps none of the others from it; the first such error is raised.
    """
    found = bindings_of(compiled)
    if not found:
        raise CalibrationError(
            "no compiled graph of this model was called yet",
            fix=bypass(compiled) or "call the compiled model under torch.inference_mode() first",
        )
    failed = []
    for lifecycle, binding in found:
        try:
            lifecycle.finalize(binding)
        except MpqError as error:
            failed.append(error)
    if failed:
        raise failed[0]


def refresh(compiled: Any) -> list[str]:
    """Look at every element of every weight now; returns the names of those that had changed.

    Raises WeightError where apply(release=True) freed the float weights.
    """
    found = bindings_of(compiled)
    if any(binding.released for _, binding in found):
        raise WeightError(
            "the float weights were freed by apply(release=True), so nothing can be refreshed",
            fix="apply the plan without release=True to edit weights",
        )
    names = {id(t): name for name, t in root_of(compiled).named_parameters()}
    changed = []
    for _, binding in found:
        values = binding.values()
        changed += [names.get(id(values[k]), k) for k in binding.refresh()]
    return sorted(set(changed))
