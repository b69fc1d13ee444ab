"""site -> the choices worth measuring, and a reason against every other one"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mpq_fx.config import nearest
from mpq_fx.errors import ConfigError
from mpq_fx.facts import Choice, Site
from mpq_fx.passes.lower.target import Target, allowed

MIN_STATIC_CALLS = 3  # distinct calls that a static range needs


@dataclass(frozen=True)
class Proposal:
    """What each site may run in; the first choice is the user's own precision."""

    options: Mapping[str, tuple[Choice, ...]]
    refusals: Mapping[str, Mapping[str, tuple[str, ...]]]


def propose(
    sites: Sequence[Site],
    target: Target,
    *,
    names: Mapping[str, str],
    rules: Mapping[str, tuple[str, ...]] | None,
    observed: frozenset[str],
    calls: int,
) -> Proposal:
    """Choices of each site under the target's capabilities, the user's rules and the calibration.

    `rules` maps globs of site names to allowed formats or choices, the last match wins.  Static
    scales need MIN_STATIC_CALLS distinct calls.
    """
    options, refusals = {}, {}
    for site in sites:
        kept, reasons = allowed(target, site, permitted(rules, names[site.name]))
        for choice in kept[1:]:
            if reason := _not_calibrated(site, choice, observed, calls):
                reasons[choice.name] = (*reasons.get(choice.name, ()), reason)
        options[site.name] = tuple(c for c in kept if c.name not in reasons or c is kept[0])
        refusals[site.name] = reasons
    return Proposal(options, refusals)


def permitted(rules: Mapping[str, tuple[str, ...]] | None, name: str) -> tuple[str, ...] | None:
    """The formats that the last matching glob allows; None where no rule speaks of the site."""
    found = None
    for glob, formats in (rules or {}).items():
        if fnmatch.fnmatchcase(name, glob):
            found = formats
    return found


def check_globs(
    rules: Mapping[str, tuple[str, ...]] | None, names: Sequence[str], others: Sequence[str] = ()
) -> None:
    """ConfigError for a glob that matches no site of a graph, nor of the `others` of its model."""
    for glob in rules or {}:
        if names and not any(fnmatch.fnmatchcase(name, glob) for name in (*names, *others)):
            raise ConfigError(
                f"formats: {glob!r} matches none of {len(names)} sites",
                fix=nearest(glob, list(names)[:40]),
            )


def _not_calibrated(site: Site, choice: Choice, observed: frozenset[str], calls: int) -> str:
    if choice.scaling == "static" and site.name not in observed:
        return "no calibration call reached this site"
    if choice.scaling == "static" and calls < MIN_STATIC_CALLS:
        return f"a static range needs {MIN_STATIC_CALLS} distinct calls, there were {calls}"
    return ""
