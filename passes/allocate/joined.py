"""groups + links  ->  one group per set of linked groups, whose options are those that agree

In this form a link is no constraint, so that a relaxation knows it exactly.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mpq_fx.passes.allocate.exact import Form
from mpq_fx.passes.allocate.groups import Group, Link, merged
from mpq_fx.passes.allocate.quantity import Quantity
from mpq_fx.passes.allocate.relaxation import Relaxation, shared_out

# Options of one joined group, at most; with more its links are left out, which keeps bounds valid.
MOST, MOST_COUPLED = 4096, 64  # a pair has a term for each two options


@dataclass(frozen=True)
class Joined:
    """The form whose group k stands for the groups `origins[k]`, and its options for `joint[k]`:
    one option of each of them.  Of a form without links, that form itself.
    """

    form: Form
    origins: tuple[tuple[int, ...], ...]
    joint: tuple[tuple[tuple[int, ...], ...], ...]
    sizes: tuple[int, ...]  # of the groups that were joined

    def apart(self, found: Relaxation | None) -> Relaxation | None:
        """What was found of the joined groups, for the groups themselves."""
        if found is None or not self.origins:
            return found
        extra = np.full((len(self.sizes), max(self.sizes, default=1)), np.inf)
        picks: dict[int, int] = {}
        for k, (origin, options) in enumerate(zip(self.origins, self.joint, strict=True)):
            for at, chosen in enumerate(options):
                places = tuple(zip(origin, chosen, strict=True))
                for g, i in places:
                    extra[g, i] = min(extra[g, i], found.extra[k, at])
                if found.picks is not None and found.picks[k] == at:
                    picks.update(places)
        return Relaxation(found.bound, tuple(picks[g] for g in sorted(picks)) or None, extra)


def joined(form: Form) -> Joined:
    """Linked groups as one, where that has few options; terms of meetings are shared out."""
    if not form.links:
        return Joined(form, (), (), ())
    sizes = tuple(len(group.options) for group in form.groups)
    most = MOST_COUPLED if form.is_coupled else MOST
    links: dict[int, list[Link]] = {}
    for link in form.links:
        for g in link.groups:
            links.setdefault(g, []).append(link)
    origins, joint = [], []
    for origin in _components(form):
        options = _agreeing(origin, sizes, links, most)
        apart = [((g,), [(i,) for i in range(sizes[g])]) for g in origin]
        for one, chosen in [(origin, options)] if options else apart:
            origins.append(tuple(one))
            joint.append(tuple(chosen))
    quantities = {
        name: tuple(_joined(shared_out(part), origins, joint) for part in parts)
        for name, parts in form.quantities.items()
    }
    groups = tuple(_group(form, o, c) for o, c in zip(origins, joint, strict=True))
    return Joined(Form(groups, quantities), tuple(origins), tuple(joint), sizes)


def _components(form: Form) -> list[list[int]]:
    """Groups that links connect, each group in one list."""
    names = {str(g): g for g in range(len(form.groups))}
    sets = [[str(g) for g in link.groups] for link in form.links]
    return [[names[name] for name in names_of] for names_of in merged(names, sets)]


def _agreeing(
    origin: Sequence[int],
    sizes: Sequence[int],
    links: Mapping[int, Sequence[Link]],
    most: int,
) -> list[tuple[int, ...]] | None:
    """Options of some groups that agree in every link; None if there are more than `most`.

    None at all is a problem without a plan, which CP-SAT proves.
    """
    found: list[tuple[int, ...]] = [()]
    for k, g in enumerate(origin):
        before = [dict(zip(origin[:k], chosen, strict=True)) for chosen in found]
        found = [
            (*chosen.values(), i)
            for chosen in before
            for i in range(sizes[g])
            if all(_agrees(link, chosen, g, i) for link in links.get(g, ()))
        ]
        if len(found) > most:
            return None
    return found


def _agrees(link: Link, chosen: Mapping[int, int], g: int, i: int) -> bool:
    """Is option i of g of the class that the groups before it took?"""
    names = dict(zip(link.groups, link.classes, strict=True))
    return all(names[h][j] == names[g][i] for h, j in chosen.items() if h in names)


def _group(form: Form, origin: Sequence[int], chosen: Sequence[Sequence[int]]) -> Group:
    groups = [form.groups[g] for g in origin]
    members = tuple(unit for group in groups for unit in group.members)
    named = (zip(groups, each, strict=True) for each in chosen)
    return Group(members, tuple(" and ".join(g.options[i] for g, i in pairs) for pairs in named))


def _joined(
    quantity: Quantity,
    origins: Sequence[Sequence[int]],
    joint: Sequence[Sequence[Sequence[int]]],
) -> Quantity:
    home = {g: (k, at) for k, origin in enumerate(origins) for at, g in enumerate(origin)}
    single = [
        [sum(quantity.single[g][i] for g, i in zip(origin, each, strict=True)) for each in chosen]
        for origin, chosen in zip(origins, joint, strict=True)
    ]
    blocks: dict[tuple[int, int], dict[tuple[int, int], int]] = {}
    for (g, h), block in quantity.blocks.items():
        (k, a), (m, b) = home[g], home[h]
        if k == m:
            for at, chosen in enumerate(joint[k]):
                single[k][at] += block.get((chosen[a], chosen[b]), 0)
            continue
        cells = blocks.setdefault((min(k, m), max(k, m)), {})
        for (c, one), (d, other) in itertools.product(enumerate(joint[k]), enumerate(joint[m])):
            if term := block.get((one[a], other[b]), 0):
                at = (c, d) if k < m else (d, c)
                cells[at] = cells.get(at, 0) + term
    kept = {at: cells for at, cells in blocks.items() if cells}
    return replace(quantity, single=tuple(map(tuple, single)), blocks=kept)
