"""max over sums of terms  ->  its linear parts, without those that no plan makes the largest"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mpq_fx.passes.allocate.problem import Peak, Term
from mpq_fx.passes.allocate.quantity import Meeting, Quantity, exact, shift_of

Places = Mapping[tuple[str, str], tuple[int, int]]  # (unit, option) -> (group, index)


def parts_of_peak(peak: Peak, sizes: Sequence[int], places: Places) -> tuple[Quantity, ...]:
    """The sums of a peak over groups of so many options each, in one unit of measure."""
    shift = shift_of(term.value for terms in peak for term in terms)
    home = {unit: g for (unit, _), (g, _) in places.items()}

    def meeting_of(term: Term) -> Meeting | None:
        """What groups have to take, without those that always do; None if they never do."""
        wanted: dict[int, set[int]] = {}
        for condition in term.when:
            keys = ((condition.unit, option) for option in condition.options)
            here = {places[key][1] for key in keys if key in places}
            g = home[condition.unit]
            wanted[g] = wanted.get(g, here) & here
        if not all(wanted.values()):
            return None
        return tuple((g, tuple(sorted(i))) for g, i in sorted(wanted.items()) if len(i) < sizes[g])

    return tuple(
        _part([(meeting_of(t), exact(t.value, shift)) for t in terms], sizes, shift)
        for terms in peak or ((),)
    )


def contenders(parts: Sequence[Quantity]) -> tuple[Quantity, ...]:
    """Parts that some plan may make the largest: each has more than another's least at its most,
    and no other part has as much under every plan.
    """
    highest = max(parts, key=lambda part: part.least)
    left = [part for part in parts if part is highest or part.most > highest.least]
    support = {id(part): _support(part) for part in left}
    found: list[Quantity] = []
    for k, part in enumerate(left):
        others = (*found, *left[k + 1 :])
        if not any(_is_below(part, other, support) for other in others):
            found.append(part)
    return tuple(found)


def _part(
    terms: Sequence[tuple[Meeting | None, int]], sizes: Sequence[int], shift: int
) -> Quantity:
    single = [[0] * size for size in sizes]
    joint: dict[Meeting, int] = {}
    constant = 0
    for meeting, value in terms:
        if meeting is None:
            continue
        if not meeting:
            constant += value
        elif len(meeting) == 1:
            ((g, options),) = meeting
            for i in options:
                single[g][i] += value
        else:
            joint[meeting] = joint.get(meeting, 0) + value
    return Quantity(tuple(map(tuple, single)), {}, shift, constant, joint)


def _support(part: Quantity) -> dict[int, tuple[int, ...]]:
    """The groups that a part depends on alone."""
    return {g: terms for g, terms in enumerate(part.single) if any(terms)}


def _is_below(
    part: Quantity, other: Quantity, support: Mapping[int, Mapping[int, tuple[int, ...]]]
) -> bool:
    """Is part <= other under every plan?  Told term by term, so that a no may be wrong."""
    if part.least > other.least or part.most > other.most:
        return False
    mine, its = support[id(part)], support[id(other)]
    above = part.constant - other.constant
    for g in dict.fromkeys((*mine, *its)):
        above += max(a - b for a, b in zip(part.single[g], other.single[g], strict=True))
    for meeting in dict.fromkeys((*part.joint, *other.joint)):
        above += max(0, part.joint.get(meeting, 0) - other.joint.get(meeting, 0))
    return above <= 0
