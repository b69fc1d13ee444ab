"""Has a weight changed?  Version counters and pointers on every call, contents by a rotating
checksum.

An edit that PyTorch counts (optimizer step, load_state_dict, in-place op under no_grad) or that
moves
the storage is seen on the very next call.  An edit through `.data` moves neither: each call sums
the
bits of one block of a few tensors, so that every tensor is looked at once in CALLS calls (enough
for
a dense edit such as an adapter merge) and every block once in CALLS · numel / BLOCK calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

CALLS = 64  # calls after which every tensor was looked at once
BLOCK = 1024  # neighboring elements summed at each look
CHUNK = 1 << 22  # elements widened to 64 bits at a time
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Watch:
    """Versions, pointers and checksums of some tensors as of the last `accept`."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        # Tensors made in inference mode have no version counter; reading it raises.
        self._counted = [k for k, t in enumerate(tensors) if not t.is_inference()]
        self._per_call = -(-len(tensors) // CALLS)
        self._turn = 0
        self._sums = [block_sums(t) for t in tensors]
        self._stamps = self._stamp(tensors)

    def accept(self, tensors: Sequence[Tensor], changed: Sequence[int]) -> None:
        """Take the present contents of the tensors at these positions as known."""
        for k in changed:
            self._sums[k] = block_sums(tensors[k])
        self._stamps = self._stamp(tensors)

    def changed(self, tensors: Sequence[Tensor]) -> list[int]:
        """Positions of tensors that were edited since `accept`, as far as one call can tell."""
        if self._stamp(tensors) == self._stamps:
            return self._look(tensors)
        return [k for k in range(len(tensors)) if self._moved(tensors, k)]

    def edited(self, tensors: Sequence[Tensor]) -> list[int]:
        """Positions of tensors whose contents differ, looking at every element."""
        return [k for k, t in enumerate(tensors) if not torch.equal(block_sums(t), self._sums[k])]

    def _stamp(self, tensors: Sequence[Tensor]) -> tuple[list[int], list[int]]:
        if len(self._counted) == len(tensors):
            versions = [t._version for t in tensors]
        else:
            versions = [tensors[k]._version for k in self._counted]
        return versions, [t.data_ptr() for t in tensors]

    def _moved(self, tensors: Sequence[Tensor], k: int) -> bool:
        versions, pointers = self._stamps
        counted = self._counted.index(k) if k in self._counted else None
        return tensors[k].data_ptr() != pointers[k] or (
            counted is not None and tensors[k]._version != versions[counted]
        )

    def _look(self, tensors: Sequence[Tensor]) -> list[int]:
        """The rotating part: one block of `_per_call` tensors."""
        found = []
        for _ in range(self._per_call):
            turn, k = divmod(self._turn, len(tensors))
            self._turn += 1
            sums = self._sums[k]
            block = turn % max(1, len(sums))
            bits = _bits(tensors[k])[block * BLOCK : (block + 1) * BLOCK]
            if len(sums) and int(weighted(bits[None])) != int(sums[block]):
                found.append(k)
        return found


def block_sums(t: Tensor) -> Tensor:
    """int64[ceil(numel / BLOCK)]: a checksum of the bits of each block of elements."""
    bits = _bits(t)
    whole = bits.numel() // BLOCK * BLOCK
    sums = [weighted(part.view(-1, BLOCK)) for part in bits[:whole].split(CHUNK)]
    return torch.cat([*sums, weighted(bits[whole:][None])] if whole < bits.numel() else sums)


def weighted(rows: Tensor) -> Tensor:
    """Σ_k (2k + 1) · row[k] mod 2⁶⁴: odd weights see every single edit, and order counts."""
    weights = _odd(rows.device, rows.shape[1])
    if rows.is_cuda:  # which has no product of int64
        return (rows.to(torch.int64) * weights).sum(1)
    return torch.mv(rows.to(torch.int64), weights)


@cache
def _odd(device: torch.device, count: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(1, 2 * count, 2, device=device)


def _bits(t: Tensor) -> Tensor:
    """The elements in storage order, as integers of their size; no copy for a dense tensor."""
    t = t.detach()
    if t.is_complex():
        t = torch.view_as_real(t)
    if t.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(t):
        flat = t.as_strided((t.numel(),), (1,), t.storage_offset())
    else:
        flat = t.reshape(-1)
    return (
        flat if flat.dtype in (torch.bool, *_BITS.values()) else flat.view(_BITS[t.element_size()])
    )
