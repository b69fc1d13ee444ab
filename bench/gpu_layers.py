"""The linear layers that bench/gpu.py measures, and at how many rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

ROWS = (1, 16, 64, 256, 1024, 4096)


@dataclass(frozen=True)
class Layer:
    """A linear of a model: [rows, K] by [N, K]."""

    model: str
    name: str
    n: int
    k: int


def layers_of(model: str, sizes: Mapping[str, tuple[int, int]]) -> tuple[Layer, ...]:
    return tuple(Layer(model, name, *size) for name, size in sizes.items())


LAYERS = (
    *layers_of(
        "llama-3-8b",
        {"qkv": (6144, 4096), "out": (4096, 4096), "up": (28672, 4096), "down": (4096, 14336)},
    ),
    *layers_of(
        "qwen2.5-7b",
        {"qkv": (4608, 3584), "out": (3584, 3584), "up": (37888, 3584), "down": (3584, 18944)},
    ),
    *layers_of(
        "flux",
        {
            "qkv": (9216, 3072),
            "out": (3072, 3072),
            "up": (12288, 3072),
            "down": (3072, 12288),
            "single in": (21504, 3072),
            "single out": (3072, 15360),
        },
    ),
    *layers_of(
        "bert-base",
        {"qkv": (2304, 768), "out": (768, 768), "up": (3072, 768), "down": (768, 3072)},
    ),
)
