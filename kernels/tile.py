"""(M, N, K, machine)  ->  Tile: how a matmul is cut, from tuned.json if that was searched

Else by a kernel's own table: the largest tile that fits and gives every processor something to do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mpq_fx.errors import ConfigError

INTERPRETER = "interpreter"  # in place of an architecture: Triton's kernels in Python, on a CPU


@dataclass(frozen=True)
class Tile:
    """A program makes block_m × block_n results, block_k steps at a time; programs that share rows
    of the weight run together, `group_m` tiles of rows deep, so that those stay in the L2 cache.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int = 8
    warps: int = 4
    stages: int = 3
    split_k: int = 1

    def __post_init__(self) -> None:
        for name, number in asdict(self).items():
            if type(number) is not int or number < 1:
                raise ValueError(
                    f"{name} of a tile is a whole number of at least 1, not {number!r}"
                )
        for name in ("block_m", "block_n", "block_k", "warps"):
            if getattr(self, name).bit_count() != 1:
                raise ValueError(f"{name} of a tile is a power of two, not {getattr(self, name)}")

    def shared_bytes(self, x_bytes: float, w_bytes: float) -> float:
        """Shared memory of a pipeline of loads, at so many bytes per value."""
        rows = self.block_m * x_bytes + self.block_n * w_bytes
        return rows * self.block_k * self.stages

    @property
    def values(self) -> float:
        """Results that a thread holds in registers."""
        return self.block_m * self.block_n / (32 * self.warps)

    def count(self, m: int, n: int) -> int:
        """Programs of a call."""
        return -(-m // self.block_m) * -(-n // self.block_n) * self.split_k


@dataclass(frozen=True)
class Machine:
    """What decides on a tile: "sm_90", multiprocessors, bytes of shared memory of a block."""

    architecture: str
    processors: int
    shared: int


def machine(device: torch.device) -> Machine:
    """Of a CUDA device; on a CPU kernels run in the interpreter, where every tile fits."""
    if device.type != "cuda":
        return Machine(INTERPRETER, 1, 1 << 30)
    return _cuda_machine(device.index if device.index is not None else torch.cuda.current_device())


@cache
def _cuda_machine(index: int) -> Machine:
    facts = torch.cuda.get_device_properties(index)
    architecture = f"sm_{facts.major}{facts.minor}"
    return Machine(architecture, facts.multi_processor_count, facts.shared_memory_per_block_optin)


ROOMY = 64  # results of a thread that leave registers for an epilogue that loads or computes


def fitting(
    tiles: Sequence[Tile], machine: Machine, x_bytes: float, w_bytes: float
) -> tuple[Tile, ...]:
    """Those that the shared memory of a block can hold."""
    return tuple(t for t in tiles if t.shared_bytes(x_bytes, w_bytes) <= machine.shared)


def roomy(tiles: Sequence[Tile]) -> tuple[Tile, ...]:
    """Those with which an epilogue of more than a bias spills no registers."""
    return tuple(t for t in tiles if t.values <= ROOMY)


def held(tiles: Sequence[Tile]) -> tuple[Tile, ...]:
    """Those whose results stay in registers where only a bias is added."""
    return tuple(t for t in tiles if t.values <= 2 * ROOMY)


def filling(tiles: Sequence[Tile], machine: Machine, m: int, n: int) -> Tile:
    """The first of `tiles`, largest first, with a program for every processor; else the last."""
    return next((t for t in tiles if t.count(m, n) >= machine.processors), tiles[-1])


def bucket(m: int) -> int:
    """Rows up to the next power of two share a tuned tile."""
    return 1 << max(m - 1, 0).bit_length()


def key(machine: Machine, m: int, n: int, k: int) -> str:
    """Of one shape in tuned.json."""
    return f"{machine.architecture} {bucket(m)} {n} {k}"


def tuned(path: Path, kernel: str, at: str) -> Tile | None:
    """The tile that a search found for a kernel and a `key`, if there was one."""
    return _read(path).get(kernel, {}).get(at)


def save(path: Path, kernel: str, found: Mapping[str, Tile]) -> None:
    """Add tiles to the file beside a kernel; they hold from the next launch on."""
    known = {name: dict(tiles) for name, tiles in _read(path).items()}
    known[kernel] = {**known.get(kernel, {}), **found}
    facts = {name: {at: asdict(t) for at, t in tiles.items()} for name, tiles in known.items()}
    path.write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")
    forget()


def forget() -> None:
    """Read every file anew, after something else wrote it."""
    _read.cache_clear()


@cache
def _read(path: Path) -> dict[str, dict[str, Tile]]:
    """kernel -> key -> tile; without a file nothing was tuned."""
    if not path.exists():
        return {}
    try:
        facts: dict[str, dict[str, dict[str, Any]]] = json.loads(path.read_text())
        return {
            name: {at: Tile(**tile) for at, tile in tiles.items()} for name, tiles in facts.items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} holds no tiles: {error}", fix=f"remove {path}") from error


def around(tile: Tile) -> Iterator[Tile]:
    """Neighbors of a tile in warps and stages: the bounded part of a search."""
    for warps in (4, 8):
        for stages in (2, 3, 4, 5):
            yield Tile(
                tile.block_m,
                tile.block_n,
                tile.block_k,
                tile.group_m,
                warps,
                stages,
                tile.split_k,
            )
