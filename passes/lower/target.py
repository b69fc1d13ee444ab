"""A target: which choices it can run, why not the others, what they cost, and how to run a graph.

A target is a value in `mpq_fx.passes.TARGETS`, or an entry point of the group mpq_fx.targets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.fx import GraphModule

from mpq_fx.errors import ConfigError, UnsupportedError
from mpq_fx.facts import Choice, Site


@dataclass(frozen=True)
class Compiled:
    """What a target runs, and what has to be redone after a constant was refreshed."""

    run: Callable[..., Any]
    derived: tuple[Callable[[], None], ...] = ()


@dataclass(frozen=True)
class Lowered:
    """What became of the sites of a graph; a site that no kernel took is Inductor's."""

    kernels: Mapping[str, str]  # site -> name of the callee that computes it
    # site -> kernel that would have been tried first -> why it did not take it
    refusals: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)


Planned = Sequence[tuple[Site, Choice, float]]  # what each site runs in, and its ms by itself


def no_mode(mode: str, sites: int, ms: float) -> tuple[str, ...]:
    """Nothing more to try."""
    return ()


def one_mode(planned: Planned) -> tuple[str, ...]:
    """A compiler with one way of doing things."""
    return ("",)


@dataclass(frozen=True)
class Target:
    """Where ops run.  Plain functions: no state, no device dispatch."""

    name: str
    unavailable: Callable[[], str]  # "" or the reason
    choices: Mapping[str, tuple[Choice, ...]]  # op of a site -> what it may run in
    refuse: Callable[[Site, Choice], Iterator[str]]  # reasons why not this one here
    measure: Callable[[Site, Choice], float]  # ms of one call
    lower: Callable[[GraphModule, str], Lowered]  # target-neutral ops -> callees, in place
    compile: Callable[[GraphModule, Sequence[Any], str], Compiled]  # in a mode, "" by default
    modes: Callable[[Planned], tuple[str, ...]] = one_mode  # most promising first
    # What may make a mode that won still faster: (mode, sites, ms of a call)
    finishing: Callable[[str, int, float], tuple[str, ...]] = no_mode
    # ms to bring an input from the format of the site before (None: any other op) to the site's own
    convert: Callable[[Site, Choice | None, Choice], float] = lambda site, before, after: 0.0
    is_timed: bool = True  # False: an oracle, whose speed means nothing
    facts: Callable[[], Mapping[str, Any]] = dict  # instruction set, versions: provenance
    predicted: str = ""  # what says how long an op takes, where nothing was measured
    # op -> choices whose ms are measured anew in every process: plug-ins run them
    unkept: Mapping[str, tuple[Choice, ...]] = field(default_factory=dict)
    tensors: tuple[str, ...] = ("cpu", "cuda")  # devices whose tensors it computes on
    # The target on a device by name, with None on the one at hand; None: it knows no other devices
    on: Callable[[str | None], Target] | None = None


def allowed(
    target: Target, site: Site, permitted: tuple[str, ...] | None
) -> tuple[tuple[Choice, ...], dict[str, tuple[str, ...]]]:
    """(choices this site may take, reasons against the others); float is always among them."""
    kept, refusals = [Choice(site.dtype, site.dtype)], {}
    for choice in target.choices.get(site.op, ()):
        reasons = tuple(target.refuse(site, choice))
        if permitted is not None and not _is_permitted(choice, permitted):
            reasons += (f"options allow only {', '.join(permitted)} here",)
        if reasons:
            refusals[choice.name] = reasons
        elif choice not in kept:
            kept.append(choice)
    return tuple(kept), refusals


def _is_permitted(choice: Choice, permitted: tuple[str, ...]) -> bool:
    return choice.name in permitted or choice.weight in permitted


def placed(target: Target, device: str | None) -> Target:
    """The target on a device that is named, or on the one at hand."""
    if target.on is not None:
        found = target.on(device)
        if found.name != target.name:
            raise ConfigError(
                f"target {target.name!r} has the `on` of target {found.name!r} and turns into it",
                fix="on=None in its replace(...), or a function of its own",
            )
        return found
    if device is not None:
        raise ConfigError(
            f"device={device!r}: target {target.name!r} plans for the machine at hand only",
            fix=f'options={{"target": "triton", "device": "{device}"}}',
        )
    return target


def available(target: Target, tensors: str = "cpu") -> Target:
    """The target, or UnsupportedError with the reason why it cannot run here a model whose tensors
    are on a kind of device.
    """
    if reason := target.unavailable():
        raise UnsupportedError(
            f"target {target.name!r} is not available: {reason}",
            fix='options={"target": "auto"} plans for this machine, "reference" runs any plan',
        )
    if tensors not in target.tensors:
        wanted = " or ".join(target.tensors)
        raise UnsupportedError(
            f"target {target.name!r} computes on {wanted}, and the model is on {tensors}",
            fix=f'model.to("{target.tensors[0]}"), or options={{"target": "auto"}}',
        )
    return target
