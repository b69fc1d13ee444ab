"""noise[u, c] = ‖e(u, c)‖² / ‖y‖²,  pair[u, c; v, d] = 2 ⟨e(u, c), e(v, d)⟩ / ‖y‖²,
e(u, c) = y(u alone in c) − y: the inter-layer augmented Hessian, from the singles alone.

At the float model the Hessian of ½ ‖y(D) − y‖² is JᵀJ; its cross terms D_vᵀ H D_u = ⟨J D_v, J D_u⟩
need one product with J for each unit, and e(u, c) is that product up to second order, for weights
and activations alike.  No backward pass, no Hessian-vector product.

Reconstruction: of "inter-layer augmented Hessian" (arXiv 2306.04879) only the abstract is public;
the terms are those of its sentence, not of its equation.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mpq_fx.facts import Table
from mpq_fx.passes.analyze.replay import Replayer, as_real, is_measurable
from mpq_fx.passes.analyze.sensitivity import (
    Options,
    Ties,
    Unit,
    in_time,
    kinds_of,
    on_pace,
    provenance_of,
    singles,
    table_of,
    units_of,
)

WIDTH = 2**14  # numbers kept of a difference; inner products are off by ‖a‖ ‖b‖ / 128 or less
SIGNIFICANT = 3.0  # standard deviations of the cosine of unrelated noise

Key = tuple[str, str]
Pair = tuple[str, str, str, str]


def interlayer_hessian(
    replay: Replayer,
    options: Options,
    records: Sequence[Sequence[Any]],
    *,
    ties: Ties = (),
    excluded: frozenset[int] = frozenset(),
    deadline: float = float("inf"),
) -> Table:
    """Noise powers of singles, and for each two of them twice the inner product of their errors.

    Costs what the singles cost.  With several outputs their relative errors are stacked, so that a
    noise power sums over outputs where `measured_singles` takes the largest.  A tie is one unit:
    its pairs stand at its first site.  A cosine that unrelated noise would have too is left out.
    """
    begin, used = time.monotonic(), 0
    units = units_of(options, ties)
    kinds = kinds_of(replay, options, units)
    wanted = on_pace(kinds, begin, deadline)
    sums: dict[Key, list[float]] = {}
    gram, keys, numbers = torch.zeros(0, 0), list[tuple[Unit, str]](), 0
    for inputs in in_time(records, begin, deadline):
        reference, rows = replay.run(inputs, {}), dict[tuple[Unit, str], Tensor]()
        for unit, choice, outputs in singles(replay, options, units, inputs, wanted):
            error = relative_difference(outputs, reference, excluded)
            rows[unit, choice.name] = sketch(error)
            power, numbers = float(error.square().sum()) / len(unit), error.numel()
            for site in unit:
                sums.setdefault((site, choice.name), []).append(power)
        products = gram_of([*rows.values()])
        gram, keys, used = products if not used else gram + products, [*rows], used + 1
        wanted = {unit for unit, _ in keys}.__contains__
    pairs = pairs_of(gram / max(1, used), [(u[0], c) for u, c in keys], numbers)
    provenance = provenance_of(used, len(records), begin, options, units)
    table = table_of("interlayer_hessian", options, kinds, sums, provenance)
    return replace(table, pairs=pairs)


def relative_difference(
    outputs: Sequence[Any], reference: Sequence[Any], excluded: frozenset[int]
) -> Tensor:
    """(y − y_ref) / ‖y_ref‖ of every floating output, flat, one behind the other, in float32."""
    parts = [
        (as_real(y).float() - as_real(ref).float()).reshape(-1) / norm
        for k, (y, ref) in enumerate(zip(outputs, reference, strict=True))
        if k not in excluded and is_measurable(ref) and (norm := as_real(ref).float().norm()) > 0
    ]
    return torch.cat(parts) if parts else torch.zeros(1)


def sketch(x: Tensor) -> Tensor:
    """s[b] = Σ of ± x[i] over the i hashed to b: unbiased inner products (count sketch).

    Vectors that are short enough stay as they are.  Charikar, Chen, Farach-Colton 2002.
    """
    if x.numel() <= WIDTH:
        return x
    buckets, signs = _hashes(x.numel())
    return torch.zeros(WIDTH).index_add_(0, buckets, x.cpu() * signs)


def gram_of(rows: Sequence[Tensor]) -> Tensor:
    """⟨row_i, row_j⟩ in float64."""
    stacked = torch.stack([*rows]).double() if rows else torch.zeros(0, 0, dtype=torch.float64)
    return stacked @ stacked.T


def pairs_of(gram: Tensor, keys: Sequence[Key], numbers: int) -> dict[Pair, float]:
    """{(u, c, v, d): 2 ⟨e(u, c), e(v, d)⟩} for u before v, where it is more than chance."""
    norms = gram.diagonal().sqrt()
    least = SIGNIFICANT / max(1, min(numbers, WIDTH)) ** 0.5 * norms[:, None] * norms
    rows, columns = torch.nonzero(torch.triu(gram.abs() > least, 1), as_tuple=True)
    return {
        (*keys[i], *keys[j]): 2.0 * float(gram[i, j])
        for i, j in zip(rows.tolist(), columns.tolist(), strict=True)
        if keys[i][0] != keys[j][0]
    }


@lru_cache(maxsize=1)
def _hashes(numel: int) -> tuple[Tensor, Tensor]:
    """Bucket and sign of each position, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    buckets = torch.randint(WIDTH, (numel,), generator=generator)
    signs = torch.randint(2, (numel,), generator=generator).float().mul_(2).sub_(1)
    return buckets, signs
