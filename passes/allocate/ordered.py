"""order of units  ->  lower as many of them as an evaluator allows: bisection, and one by one

The searches of "sensitivity-guided search" (arXiv 2302.01382), and the order that the inter-layer
augmented Hessian (arXiv 2306.04879) gives them.  Reconstructions: of both papers only abstracts are
public.  They ask an evaluator of whole assignments and know neither costs nor budgets; what they
return was evaluated and allowed, or is where they started.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

Assignment = dict[str, str]
IsAllowed = Callable[[Assignment], bool]
# (candidates, the assignment so far, option to give them) -> those it is for, least sensitive first
Order = Callable[[Sequence[str], Assignment, str], Sequence[str]]


def incremental_order(
    units: Sequence[str],
    alone: Mapping[str, float],
    pairs: Mapping[tuple[str, str], float],
) -> list[str]:
    """C <- {}; repeat: append argmin over u outside C of alone[u] + Σ_{v in C} pairs[u, v].

    Interactions count once both units are in C.  Without pairs this is the order of `alone`.  Equal
    terms keep the order of `units`.
    """
    terms = {unit: alone[unit] for unit in units}
    order: list[str] = []
    while terms:
        best = min(terms, key=lambda unit: terms[unit])
        del terms[best]
        order.append(best)
        for unit in terms:
            terms[unit] += pairs.get((best, unit), 0.0) + pairs.get((unit, best), 0.0)
    return order


def bisection(
    start: Assignment, menu: Sequence[str], order: Order, is_allowed: IsAllowed
) -> Assignment:
    """For each option of the menu: the longest prefix of the order that may take it.

    Only those may go lower still, and what the option is not for.  ⌈log2(units + 1)⌉ evaluations
    for each option.  With an evaluator that is not monotone the answer is allowed, though perhaps
    not the longest.
    """
    found, candidates = dict(start), list(start)
    for option in menu:
        able = list(order(candidates, found, option))
        low, high = 0, len(able)
        while low < high:
            middle = (low + high + 1) // 2
            if is_allowed({**found, **dict.fromkeys(able[:middle], option)}):
                low = middle
            else:
                high = middle - 1
        found |= dict.fromkeys(able[:low], option)
        candidates = [unit for unit in candidates if unit not in able[low:]]
    return found


def greedy(
    start: Assignment, menu: Sequence[str], order: Order, is_allowed: IsAllowed
) -> Assignment:
    """For each option of the menu: every unit in the order that may take it, one by one.

    Only those may go lower still, and what the option is not for.  As many evaluations for each
    option as units are left.
    """
    found, candidates = dict(start), list(start)
    for option in menu:
        for unit in list(order(candidates, found, option)):
            trial = {**found, unit: option}
            if is_allowed(trial):
                found = trial
            else:
                candidates.remove(unit)
    return found
