"""peak(choices) = max over ops of Σ bytes of the values between ops that are live there

A value that only sites read, all in one format whose scale is known before the call, is stored in
it; any other in the user's precision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mpq_fx.facts import Choice, Live, Value
from mpq_fx.formats import FORMATS

Options = Mapping[str, Sequence[Choice]]


def peak(live: Sequence[Live], choices: Mapping[str, Choice]) -> int:
    """Bytes at the op where most is live, each value in the format that the choices give it."""
    return max((sum(stored_bytes(v, choices) for v in found) for found in live), default=0)


def stored_bytes(value: Value, choices: Mapping[str, Choice]) -> int:
    """Bytes of one value: in its readers' format where they agree, else in the user's precision."""
    formats = {_stored_in(choices.get(site)) for site in value.deciding}
    return _bytes_in(value, formats.pop() if len(formats) == 1 else "")


@dataclass(frozen=True)
class Change:
    """`bytes` more, or fewer, where each site takes one of the choices named here."""

    bytes: int
    choices: Mapping[str, tuple[str, ...]]


def changes(value: Value, options: Options) -> tuple[Change, ...]:
    """stored_bytes(value) - value.bytes, of which one change at most takes place."""
    found = []
    for fmt in _common_formats(value, options):
        if more := _bytes_in(value, fmt) - value.bytes:
            agreed = {
                site: tuple(c.name for c in options[site] if _stored_in(c) == fmt)
                for site in value.deciding
            }
            found.append(Change(more, agreed))
    return tuple(found)


def contenders(live: Sequence[Live], options: Options) -> tuple[Live, ...]:
    """The sets that some choices may make the peak; what no choice changes is one value of each."""
    extremes = {value: _extremes(value, options) for found in live for value in found}
    least = {found: sum(extremes[v][0] for v in found) for found in live}
    highest = max(live, key=least.__getitem__, default=())
    kept = [
        found
        for found in live
        if found is highest or sum(extremes[v][1] for v in found) > least[highest]
    ]
    return tuple(dict.fromkeys(_merged(found, extremes) for found in kept))


def _common_formats(value: Value, options: Options) -> list[str]:
    """Formats that all sites that decide on a value can store it in."""
    offered = [{_stored_in(c) for c in options[site]} for site in value.deciding]
    return sorted(set.intersection(*offered) - {""}) if offered else []


def _extremes(value: Value, options: Options) -> tuple[int, int]:
    found = [value.bytes, *(_bytes_in(value, fmt) for fmt in _common_formats(value, options))]
    return min(found), max(found)


def _merged(found: Live, extremes: Mapping[Value, tuple[int, int]]) -> Live:
    changing = tuple(v for v in found if extremes[v][0] < extremes[v][1])
    constant = sum(v.bytes for v in found if extremes[v][0] == extremes[v][1])
    return (Value(constant, 1), *changing) if constant else changing


def _bytes_in(value: Value, fmt: str) -> int:
    if not fmt:
        return value.bytes
    return math.ceil(value.bytes // value.itemsize * FORMATS[fmt].element.bits / 8)


def _stored_in(choice: Choice | None) -> str:
    """The format of what a choice reads; "" where it is stored as it is, and converted on reading:
    a scale that is computed on every call needs the whole value first.
    """
    if choice is None or choice.scaling == "dynamic" or choice.activation not in FORMATS:
        return ""
    return choice.activation
