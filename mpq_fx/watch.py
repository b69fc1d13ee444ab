"""Has a weight changed?  Version counters and pointers on every call, contents by a rotating
checksum.

An edit that PyTorch counts (optimizer step, load_state_dict, in-place op under no_grad) or that
moves the storage is seen on the very next call.  An edit through `.data` moves neither: each call
checks the bytes of one block of a few tensors, so that every tensor is looked at once in CALLS
calls (enough for a dense edit such as an adapter merge) and every block once in CALLS · bytes /
BLOCK calls.
"""

from __future__ import annotations

import ctypes
import zlib
from array import array
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

CALLS = 64  # calls after which every tensor was looked at once
BLOCK = 4096  # bytes checked at each look

Stamp = tuple[int | None, int]  # version and address
Seen = Mapping[int, "tuple[Stamp, array[int]]"]  # position -> stamp and checksums


class Watch:
    """Versions, pointers and checksums of some tensors as of the last `accept`."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        # Tensors made in inference mode have no version counter; reading it raises.
        self._counted = [k for k, t in enumerate(tensors) if not t.is_inference()]
        self._per_call = -(-len(tensors) // CALLS)
        self._turn = 0
        self._sums = [checksums(t) for t in tensors]
        self._stamps = self._stamp(tensors)

    def seen(self, tensors: Sequence[Tensor], changed: Sequence[int]) -> Seen:
        """The tensors at these positions as they are, for `accept`.

        To be asked before something is computed from them: what another thread edits meanwhile is
        then seen as changed by the next call.
        """
        return {k: (stamp(tensors[k]), checksums(tensors[k])) for k in changed}

    def accept(self, seen: Seen) -> None:
        """Take these contents as known."""
        versions, pointers = self._stamps
        for k, ((version, pointer), sums) in seen.items():
            self._sums[k], pointers[k] = sums, pointer
            if version is not None:
                versions[self._counted.index(k)] = version

    def changed(self, tensors: Sequence[Tensor]) -> list[int]:
        """Positions of tensors that were edited since `accept`, as far as one call can tell."""
        if self._stamp(tensors) == self._stamps:
            return self._look(tensors)
        return [k for k in range(len(tensors)) if self._moved(tensors, k)]

    def edited(self, tensors: Sequence[Tensor]) -> list[int]:
        """Positions of tensors whose contents differ, looking at every element."""
        return [k for k, t in enumerate(tensors) if checksums(t) != self._sums[k]]

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
            if sums and checksum(dense(tensors[k]), block) != sums[block]:
                found.append(k)
        return found


def stamp(t: Tensor) -> Stamp:
    """What an edit that PyTorch counts, or one that moves the storage, makes another."""
    return None if t.is_inference() else t._version, t.data_ptr()


def checksums(t: Tensor) -> array[int]:
    """CRC-32 of each block of bytes, in storage order."""
    t = dense(t)
    return array("L", [checksum(t, block) for block in range(-(-t.nbytes // BLOCK))])


def checksum(t: Tensor, block: int) -> int:
    """CRC-32 of one block of a dense tensor in main memory; any edit of one element changes it."""
    begin = block * BLOCK
    size = max(0, min(BLOCK, t.nbytes - begin))  # it may be shorter than it was
    return zlib.crc32(ctypes.string_at(t.data_ptr() + begin, size))


def dense(t: Tensor) -> Tensor:
    """The tensor itself where it fills its memory, of whatever order; else a copy that does."""
    if t.is_cpu and (t.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(t)):
        return t
    return t.detach().cpu().contiguous()
