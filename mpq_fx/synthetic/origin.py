"""batch -> where it came from: carried by each batch, so that slices and mixtures keep it

`tune` reads it, warns once, and writes it into the plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mpq_fx.facts import SYNTHETIC, Plan


@dataclass(frozen=True)
class Origin:
    """How a batch was made: `words` follow "was" or "were" in a sentence."""

    method: str
    words: str
    facts: Mapping[str, Any] = field(default_factory=dict)  # seed, steps, loss, …


class Arguments(tuple):
    """A batch of positional arguments, model(*batch), and its origin."""

    origin: Origin

    def __new__(cls, values: Iterable[Any], origin: Origin) -> Arguments:
        made = super().__new__(cls, tuple(values))
        made.origin = origin
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (tuple(self), self.origin)


class Keywords(dict):
    """A batch of arguments by name, model(**batch), and its origin."""

    def __init__(self, values: Mapping[str, Any], origin: Origin) -> None:
        super().__init__(values)
        self.origin = origin

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self), self.origin)


def origin_of(batch: Any) -> Origin | None:
    """Where a batch came from; None for the user's own."""
    return batch.origin if isinstance(batch, (Arguments, Keywords)) else None


def synthetic_facts(batches: Sequence[Any]) -> dict[str, Any]:
    """What a plan keeps: one note for people, one record per synthetic batch; {} for real data."""
    origins = [origin for batch in batches if (origin := origin_of(batch)) is not None]
    if not origins:
        return {}
    kinds = Counter(origin.words for origin in origins)
    total = len(batches)
    counted = ", ".join(f"{n} of {total} batches were {words}" for words, n in kinds.items())
    part = "" if len(origins) == total else " in part"
    note = (
        f"calibrated{part} without data: {counted}; errors and static ranges are of these, not of "
        "real inputs"
    )
    return {"note": note, "batches": [{"method": o.method, **o.facts} for o in origins]}


def with_origins(plan: Plan, facts: Mapping[str, Any]) -> Plan:
    """A plan that says of its calibration what `synthetic_facts` found."""
    if not facts:
        return plan
    provenance = {**plan.provenance, SYNTHETIC: dict(facts)}
    return replace(plan, provenance=provenance, notes=(facts["note"], *plan.notes))
