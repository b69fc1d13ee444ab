"""plan -> installed binding, without calibration: a plan from a file, or from a graph of the same
weights.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mpq_fx.binding import Binding, Installed
from mpq_fx.build import lower
from mpq_fx.config import Config
from mpq_fx.describe import fingerprint
from mpq_fx.errors import MpqError, PlanError, first_line
from mpq_fx.facts import INDUCTOR, Choice, Plan, Site
from mpq_fx.first_call import install_compared
from mpq_fx.formats import FORMATS
from mpq_fx.graph import kind_of
from mpq_fx.lifecycle import FREED
from mpq_fx.passes import target_named
from mpq_fx.passes.lower.target import Target, available
from mpq_fx.remeasured import is_predicted, remeasured

if TYPE_CHECKING:
    from mpq_fx.compiler import Graph

log = logging.getLogger("mpq_fx")
FLOAT_WINS = "no allowed plan is faster than float"
# Sites that every graph of a model has.  Others come and go with its shapes: looking up positions
# of a fixed length gives a constant, which is no site.
LASTING = ("linear", "conv")
FACTS = {"op", "weight_shape", "dtype"}  # of a site in a fingerprint, which `chosen` compares


def install_plan(graph: Graph, binding: Binding, plan: Plan, config: Config) -> None:
    """Lower the plan's choices for this graph, or leave it in float where that won.

    Raises PlanError where the plan cannot mean this model.
    """
    check_whole(plan)
    name = plan.target if config.target == "auto" else config.target
    kind = kind_of(binding.values().values())
    target = available(target_named(name, config.device, kind), kind)
    choices = {
        site.name: chosen(plan, site, binding.site_names[site.name], target) for site in graph.sites
    }
    if target.is_timed and is_predicted(plan):
        plan = remeasured(plan, target, config.cache_dir)
        log.info("%s", plan.notes[-1])
    warn_of_machine(plan, target)
    mode = mode_of(plan, binding.site_names.values())
    if plan.target != target.name and mode != INDUCTOR:
        mode = ""  # another target's word
    if mode == INDUCTOR:
        binding.keep_float(FLOAT_WINS, plan)
        return
    compiled = partial(_lowered, graph, target, binding, choices, plan)
    mode, installed = _compiled(mode, compiled)
    if mode:
        install_compared(binding, plan, installed, mode, partial(compiled, ""))
    else:
        binding.install(installed, plan)


def _compiled(mode: str, compiled: Callable[[str], Installed]) -> tuple[str, Installed]:
    """In the plan's mode; in the plainest one where that has no code for this shape."""
    try:
        return mode, compiled(mode)
    except MpqError:
        raise
    except Exception as error:  # whatever a compiler raises
        if not mode:
            raise
        log.warning(
            "the plan does not compile with %s in this shape, and is compiled without: %s",
            mode,
            first_line(error),
        )
        return "", compiled("")


def _lowered(
    graph: Graph,
    target: Target,
    binding: Binding,
    choices: Mapping[str, Choice],
    plan: Plan,
    mode: str,
) -> Installed:
    scales = scales_of(plan, binding.site_names)
    for name, choice in choices.items():
        if choice.scaling == "static" and (name, choice.activation) not in scales:
            raise PlanError(
                f"{binding.site_names[name]}: the plan has no static scale for {choice}",
                fix="load the plan as mpq-fx wrote it, or tune again",
            )
        kind = FORMATS.get(choice.activation)
        if choice.scaling == "none" and kind is not None and not kind.is_plain:
            raise PlanError(
                f"{binding.site_names[name]}: {choice} does not say when the scale of its "
                f"{choice.activation} is known",
                fix=f"{choice}/dynamic",
            )
    with torch.inference_mode(False), torch.no_grad(), torch._C._DisableAutocast():
        return lower(graph, target, binding.values(), choices, scales, mode)[0]


def warn_of_machine(plan: Plan, target: Target) -> None:
    """What was measured on a CPU with other instructions, or predicted for a GPU, says little here:
    errors may, and milliseconds do differ.  Another target has other facts to begin with.
    """
    there, here = plan.provenance.get("target", {}), target.facts()
    differences = [f"{k} {there[k]}, here {v}" for k, v in here.items() if there.get(k, v) != v]
    if differences:
        log.warning(
            "the plan is from another machine (%s): what it says of milliseconds does not "
            "hold; mpq_fx.tune(model, batches) plans for this one",
            "; ".join(differences),
        )


def check_whole(plan: Plan) -> None:
    """PlanError where a hand took out something that a plan has of every site."""
    sites = plan.fingerprint.get("sites")
    names = sites if isinstance(sites, Mapping) else {}
    broken = [n for n, known in names.items() if not isinstance(known, Mapping) or FACTS - {*known}]
    for what, found in (
        ("no sites in its fingerprint", [] if isinstance(sites, Mapping) else ["fingerprint"]),
        ("no op, weight_shape or dtype of a site", broken),
        ("no choice of a site", [name for name in names if name not in plan.choices]),
    ):
        if found:
            raise PlanError(
                f"the plan has {what}: {found[0]}",
                fix="load the file as mpq-fx wrote it, or tune again",
            )


def check_layers(plan: Plan, model: torch.nn.Module) -> None:
    """PlanError where the plan has a layer that the model has not.

    Graphs check the layers that they have when they are compiled; none of them misses one.
    """
    check_whole(plan)
    paths = {name for name, _ in (*model.named_modules(), *model.named_parameters())}
    for name, facts in plan.fingerprint["sites"].items():
        path = name.partition("#")[0]
        is_path = "." in path or path.isdigit()  # other names are those of a graph's own values
        if facts["op"] in LASTING and is_path and path not in paths:
            raise PlanError(
                f"the plan has a layer {path!r}, {type(model).__name__} has not",
                fix="tune this model: mpq_fx.tune(model, batches)",
            )


def mode_of(plan: Plan, names: Iterable[str]) -> str:
    """How the graph with sites of these names was compiled: graphs of one model may differ."""
    wanted = set(names)
    return next((row.mode for row in plan.ledger if row.site.name in wanted), "")


def chosen(plan: Plan, site: Site, name: str, target: Target) -> Choice:
    """The plan's choice for one site, checked against the site and the target; float where only
    this graph has such a site.
    """
    known = plan.fingerprint["sites"].get(name)
    if known is None and site.op not in LASTING:
        return Choice(site.dtype, site.dtype)
    if known is None:
        raise PlanError(
            f"the plan has no site {name!r} ({site.op})",
            at=site.source,
            fix="tune this model: mpq_fx.tune(model, batches)",
        )
    for fact, here in (
        ("op", site.op),
        ("weight_shape", list(site.weight_shape)),
        ("dtype", site.dtype),
    ):
        if known[fact] != here:
            raise PlanError(
                f"{name}: the plan was made for {fact} {known[fact]}, this model has {here}",
                at=site.source,
                fix="tune this model: mpq_fx.tune(model, batches)",
            )
    choice = plan.choices[name]
    reasons = refused(site, choice, target)
    if reasons and not refused(as_planned(plan, site, name), choice, target):
        log.warning("%s runs in %s in this shape: %s", name, site.dtype, "; ".join(reasons))
        return Choice(site.dtype, site.dtype)
    if reasons:
        raise PlanError(
            f"{name}: {choice} cannot run on {target.name} here: {'; '.join(reasons)}",
            fix="tune again on this machine, or plan.resolve(...) on the one it is from",
        )
    return choice


def refused(site: Site, choice: Choice, target: Target) -> tuple[str, ...]:
    return () if choice.weight == site.dtype else tuple(target.refuse(site, choice))


def as_planned(plan: Plan, site: Site, name: str) -> Site:
    """The site in the shape that the plan was made for."""
    shapes = (row.site.input_shape for row in plan.ledger if row.site.name == name)
    return replace(site, input_shape=next(shapes, site.input_shape))


def scales_of(plan: Plan, names: Mapping[str, str]) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """Static scales of a plan under the names that sites have in this graph."""
    local = {name: site for site, name in names.items()}
    found = {}
    for key, tensor in plan.tensors.items():
        name, _, rest = key.partition("|")
        fmt, _, kind = rest.partition("|")
        if kind == "scale" and name in local:
            found[local[name], fmt] = tensor, plan.tensors[f"{name}|{fmt}|zero"]
    return found


def donor(graph: Graph, binding: Binding, others: Iterable[Binding]) -> Plan | None:
    """A solved plan of another graph that knows the sites of this one, on the very same weights."""
    mine = {id(ref()) for ref in binding.parameters}
    wanted = fingerprint(graph.sites, binding.site_names)["sites"]
    for other in others:
        if other is binding or other.plan is None or other.installed is None:
            continue
        known = other.plan.fingerprint["sites"]
        if mine <= {id(ref()) for ref in other.parameters} and covers(known, wanted):
            return other.plan
    return None


def covers(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Does a plan know a graph's sites, all but a few that only this graph has?"""
    shared, new = wanted.keys() & known.keys(), wanted.keys() - known.keys()
    return (
        bool(shared)
        and all(known[name] == wanted[name] for name in shared)
        and all(wanted[name]["op"] not in LASTING for name in new)
    )


def release(binding: Binding) -> int:
    """Free the float weights that only constants were made from; returns the bytes freed.

    Sizes and strides stay as they are, so that Dynamo's guards still hold; the contents are gone.
    """
    installed = binding.installed
    assert installed is not None
    live = set(installed.live_names)
    freed = 0
    for name, tensor in binding.values().items():
        if name in binding.watched and name not in live:
            storage = tensor.untyped_storage()
            freed += storage.nbytes()
            storage.resize_(0)
    binding.released, binding.watch = True, None
    return freed


def refuse_freed(example_inputs: Iterable[Any]) -> None:
    """A graph cannot be compiled over weights that `release` freed; raises MpqError."""
    for x in example_inputs:
        if isinstance(x, Tensor) and x.layout == torch.strided and _is_freed(x):
            raise MpqError(
                FREED, fix="release=False, to train or to call the model in other shapes"
            )


def _is_freed(x: Tensor) -> bool:
    return x.numel() > 0 and x.untyped_storage().nbytes() == 0
