"""value = (code - zero) * scale: number formats as facts; everything else is derived from them.

A new format is one more line in `BUILT_IN`.  How values are rounded is written in `numerics`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from mpq_fx.errors import ConfigError
from mpq_fx.plugins import Catalog

TENSOR = -1  # one scale for the whole tensor
ROW = 0  # one scale per row, that is per output channel of a weight and per token of an activation


@dataclass(frozen=True)
class Int:
    """value = code: two's complement if signed, else 0 … 2^bits - 1."""

    bits: int
    signed: bool = True

    @property
    def min(self) -> int:
        return -(1 << self.bits - 1) if self.signed else 0

    @property
    def max(self) -> int:
        return self.min + (1 << self.bits) - 1


@dataclass(frozen=True)
class Float:
    """value = ±2^(e - bias) · (1 + m / 2^man), and ±2^(1 - bias) · m / 2^man where e = 0.

    `specials` says what the codes with the largest exponent mean: "ieee" infinities and NaNs
    (e5m2), "nan" numbers but for the all-ones code (e4m3fn), "none" numbers only (e2m1fn).
    """

    exp: int
    man: int
    specials: Literal["ieee", "nan", "none"] = "ieee"

    @property
    def bits(self) -> int:
        return 1 + self.exp + self.man

    @property
    def bias(self) -> int:
        return (1 << self.exp - 1) - 1

    @property
    def max_code(self) -> int:
        """Of the largest finite value: the codes from 0 to it are the finite magnitudes."""
        reserved = {"ieee": 1 << self.man, "nan": 1, "none": 0}[self.specials]
        return (1 << self.exp + self.man) - 1 - reserved

    @property
    def max(self) -> float:
        return self.value(self.max_code)

    def value(self, code: int) -> float:
        """The magnitude a code without its sign bit stands for."""
        exponent, mantissa = code >> self.man, code & (1 << self.man) - 1
        normal = exponent > 0
        fraction = normal + mantissa / (1 << self.man)
        return math.ldexp(fraction, (exponent if normal else 1) - self.bias)


DTYPES = {
    Int(8, signed=False): torch.uint8,
    Float(8, 23): torch.float32,
    Float(8, 7): torch.bfloat16,
    Float(5, 10): torch.float16,
    Float(5, 2): torch.float8_e5m2,
    Float(4, 3, "nan"): torch.float8_e4m3fn,
}


@dataclass(frozen=True)
class Progressive:
    """code = step · q + low,   0 <= q < 2^bits: codes of `block` values on a grid of few integers

    The second level of progressive group quantization (QoQ of QServe, arXiv:2405.04532, as a
    reconstruction): step and low are integers of a byte each for every `block` codes along K, so
    that a kernel widens q to a code in integers.  `limit`, the protective range, is what codes of
    the first level keep to, so that no grid leaves them: 2 · 120 = 15 steps of 16.
    """

    bits: int = 4
    block: int = 128
    limit: int = 120

    @property
    def steps(self) -> int:
        """From the lowest value of a grid to its highest."""
        return (1 << self.bits) - 1

    def groups(self, k: int) -> int:
        return -(-k // self.block)


@dataclass(frozen=True)
class Format:
    """value = (code - zero) * scale; `block` values along K share one scale (and one zero point).

    `block` is TENSOR, ROW, or a number of values.  `scale` is the dtype scales are stored in, None
    for a plain float, whose values are their own codes.  A symmetric format has zero = 0 and leaves
    the lowest integer unused, so that a tensor and its negative have negative codes; an asymmetric
    one has a zero point within the range of its codes.  Scaled floats are symmetric.

    Codes of a `progressive` format are codes like any others, and every kernel of those runs it;
    that they take few values in a group only matters to how they are stored, and to a kernel that
    reads them so.
    """

    name: str  # the only spelling, in configs, errors, plans, benchmarks
    element: Int | Float
    scale: torch.dtype | None = None
    block: int = ROW
    symmetric: bool = True
    progressive: Progressive | None = None

    def __post_init__(self) -> None:
        assert self.block in (TENSOR, ROW) or self.block > 0, f"{self.name}: block {self.block}"
        is_float = isinstance(self.element, Float)
        assert is_float or self.scale is not None, f"{self.name}: integers need a scale"
        assert self.symmetric or not is_float, f"{self.name}: floats have no zero point"
        plain_rows = self.element == Int(8) and self.block == ROW and self.symmetric
        assert not self.progressive or plain_rows, f"{self.name}: a second level is of int8 rows"

    def __str__(self) -> str:
        return self.name

    @property
    def is_plain(self) -> bool:
        """A plain float: an op casts to it, and there are neither codes nor scales."""
        return self.scale is None

    @property
    def has_float_codes(self) -> bool:
        """Codes that are floats with a scale, such as 8-bit ones."""
        return isinstance(self.element, Float) and not self.is_plain

    @property
    def max(self) -> float:
        """The largest magnitude of a code: absmax = max * scale."""
        return self.progressive.limit if self.progressive else self.element.max

    @property
    def qmax(self) -> int | float:
        """The largest code; of float codes the largest finite value."""
        assert not self.is_plain, f"{self.name} is a plain float and has no codes"
        return self.element.max

    @property
    def qmin(self) -> int | float:
        """The least code in use."""
        if isinstance(self.element, Int) and not (self.symmetric and self.element.signed):
            return self.element.min
        return -self.qmax

    @property
    def dtype(self) -> torch.dtype:
        """What holds one unpacked code: int8 or uint8, or the float type of the element."""
        if isinstance(self.element, Int):
            return DTYPES.get(self.element, torch.int8)
        return DTYPES[self.element]

    @property
    def stored_bits(self) -> int:
        """Of one code in a packed tensor: 4, 8, 16 or 32; a 7-bit code takes a byte."""
        bits = self.progressive.bits if self.progressive else self.element.bits
        return 1 << (bits - 1).bit_length()

    def groups(self, k: int) -> int:
        """Scales per row of `k` values; the last group may be ragged."""
        return -(-k // self.block) if self.block > 0 else 1

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Of the scales of a tensor of `shape`: (), (..., 1) or (..., groups)."""
        if self.block == TENSOR:
            return ()
        *rows, k = shape or (1,)
        return (*rows, self.groups(k))

    def storage_bits(self, shape: Sequence[int]) -> int:
        """Exact bits of a weight of `shape`: codes, scales, one byte per zero point, padding.

        Rows are dimension 0, K is the rest; a ragged last group is stored whole, and a row ends on
        a byte.
        """
        rows, rest = (shape[0], shape[1:]) if len(shape) > 1 else (1, shape)
        k = math.prod(rest)
        if self.progressive and self.scale:
            groups = self.progressive.groups(k)  # a byte for step and low each
            packed = groups * (self.progressive.block * self.stored_bits + 16)
            return rows * (packed + self.scale.itemsize * 8)
        padded = self.groups(k) * self.block if self.block > 0 else k
        codes = rows * (-(-padded * self.stored_bits // 8) * 8)
        if self.scale is None:
            return codes
        scales = 1 if self.block == TENSOR else rows * self.groups(k)
        return codes + scales * (self.scale.itemsize * 8 + (0 if self.symmetric else 8))


def index(*formats: Format) -> dict[str, Format]:
    """name -> format; a name that stands twice is refused."""
    table: dict[str, Format] = {}
    for fmt in formats:
        if fmt.name in table:
            raise ConfigError(
                f"two formats are named {fmt.name!r}: {table[fmt.name]!r} and {fmt!r}",
                fix="give one of them another name",
            )
        table[fmt.name] = fmt
    return table


BUILT_IN = index(
    Format("float32", Float(8, 23)),
    Format("bfloat16", Float(8, 7)),
    Format("float16", Float(5, 10)),
    Format("int8", Int(8), scale=torch.float32),
    Format("int8_tensor", Int(8), scale=torch.float32, block=TENSOR),
    Format("int8_asym", Int(8), scale=torch.float32, symmetric=False),
    Format("int8_tensor_asym", Int(8), scale=torch.float32, block=TENSOR, symmetric=False),
    Format("uint8_tensor", Int(8, signed=False), torch.float32, block=TENSOR, symmetric=False),
    # Codes of ±63: handed to an x86 without VNNI as uint8 codes around 64, two products with int8
    # weights (2 · 127 · 127) still fit the int16 that vpmaddubsw saturates.
    Format("int7_tensor", Int(7), scale=torch.float32, block=TENSOR),
    Format("int8_g128", Int(8), scale=torch.float32, block=128),
    Format("int4", Int(4), scale=torch.float16, block=128),  # 4.125 bits
    Format("int4_g32", Int(4), scale=torch.float16, block=32),  # 4.5 bits
    Format("int4_row", Int(4), scale=torch.float16),
    Format("int4_tensor", Int(4), scale=torch.float32, block=TENSOR),
    Format("int4_asym", Int(4), scale=torch.float16, block=128, symmetric=False),
    Format("int4_progressive", Int(8), scale=torch.float32, progressive=Progressive()),  # 4.125
    Format("fp8_e4m3", Float(4, 3, "nan"), scale=torch.float32),
    Format("fp8_e4m3_tensor", Float(4, 3, "nan"), scale=torch.float32, block=TENSOR),
)
FORMATS: Catalog[Format] = Catalog("formats", BUILT_IN)  # and those of plug-ins


def format_named(name: str) -> Format:
    """FORMATS[name], or an error that names the nearest format there is."""
    if name in FORMATS:
        return FORMATS[name]
    near = difflib.get_close_matches(str(name), [*FORMATS], n=1, cutoff=0.0)
    raise ConfigError(
        f"unknown format {name!r}; there are {', '.join(FORMATS)}",
        fix=f"did you mean {near[0]!r}?" if near else "",
    )
