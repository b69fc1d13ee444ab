"""noise[u, c] = ‖e(u, c)‖² / ‖y‖²,  pair[u, c; v, d] = 2 ⟨e(u, c), e(v, d)⟩ / ‖y‖²,
e(u, c) = y(u alone in c) − y: the inter-layer augmented Hessian, from the singles alone.

At the float model the Hessian of ½ ‖y(D) − y‖² is JᵀJ; its cross terms D_vᵀ H D_u = ⟨J D_v, J D_u⟩
need one product with J for each unit, and e(u, c) is that product up to second order, for weights
and activations alike.  No backward pass, no Hessian-vector product.

Reconstruction: of "inter-layer augmented Hessian" (arXiv 2306.04879) only the abstract is public;
the terms are those of its sentence, not of its equation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mpq_fx.facts import Table
from mpq_fx.passes.analyze.metric import IsWanted, Key, Record, Single, Task, averaged, singles
from mpq_fx.passes.analyze.replay import as_real, difference, finite_norm, is_measurable

WIDTH = 2**14  # numbers kept of a difference; inner products are off by ‖a‖ ‖b‖ / 128 or less
SIGNIFICANT = 3.0  # standard deviations of the cosine of unrelated noise

Pair = tuple[str, str, str, str]
# outputs, those of the float model, positions of caches among them -> a row of numbers
Difference = Callable[[Sequence[Any], Sequence[Any], frozenset[int]], Tensor]


def interlayer_hessian(task: Task) -> Table:
    """Noise powers of singles, and for each two of them twice the inner product of their errors.

    Costs what the singles cost.  With several outputs their relative errors are stacked, so that a
    noise power sums over outputs where `measured_singles` takes the largest.  A tie is one unit:
    its pairs stand at its first site.  A cosine that unrelated noise would have too is left out.
    """
    return with_cross_terms("interlayer_hessian", task, relative_difference)


def with_cross_terms(metric: str, task: Task, differs: Difference) -> Table:
    """‖e(u, c)‖² and 2 ⟨e(u, c), e(v, d)⟩ of the differences that singles make at the outputs."""
    grams, keys, numbers = list[Tensor](), list[Key](), 0

    def each(record: Record, is_wanted: IsWanted) -> Iterator[Single]:
        reference = task.replay.run(record, {})
        for unit, choice, outputs in singles(task, record, is_wanted):
            error = differs(outputs, reference, task.excluded)
            yield Single(unit, choice, float(error.square().sum()), sketch(error))

    def keep(given: Sequence[Single]) -> None:
        nonlocal keys, numbers
        rows = rows_of(given)
        grams.append(gram_of([*rows.values()]))
        keys, numbers = [*rows], max((len(row) for row in rows.values()), default=0)

    table = averaged(metric, task, each, forward_passes=task.suffixes, keep=keep)
    return replace(table, pairs=pairs_of(torch.stack(grams).mean(0), keys, numbers))


def rows_of(given: Sequence[Single]) -> dict[Key, Tensor]:
    """What each single told beside its power."""
    return {single.key: single.row for single in given if single.row is not None}


def relative_difference(
    outputs: Sequence[Any], reference: Sequence[Any], excluded: frozenset[int]
) -> Tensor:
    """(y − y_ref) / ‖y_ref‖ of every floating output, flat, one behind the other, in float32."""
    parts = [
        difference(as_real(y).float(), as_real(ref).float()).reshape(-1) / norm
        for k, (y, ref) in enumerate(zip(outputs, reference, strict=True))
        if k not in excluded and is_measurable(ref) and (norm := finite_norm(ref)) > 0
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
    return pairs_above(chance(2.0 * norms[:, None] * norms, numbers), 2.0 * gram, keys)


def chance(products: Tensor, numbers: int) -> Tensor:
    """The largest inner products likely of unrelated errors, from the products of their norms."""
    return SIGNIFICANT / max(1, min(numbers, WIDTH)) ** 0.5 * products


def pairs_above(least: Tensor, terms: Tensor, keys: Sequence[Key]) -> dict[Pair, float]:
    """{(u, c, v, d): term} of two units, u before v, where it is more than the least."""
    rows, columns = torch.nonzero(torch.triu(terms.abs() > least, 1), as_tuple=True)
    return {
        (*keys[i], *keys[j]): float(terms[i, j])
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
