"""mpq::linear of float activations  ->  a kernel that widens the weight's codes in registers

int8       _weight_int8pack_mm(x, codes, scale) + bias
int4       _weight_int4pack_mm_for_cpu(x, pack(codes), block, [scale, -zero · scale]) + bias

Both read the weight once per few rows of x, which is what one row waits for; at many rows they are
several times slower than a matmul in bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from mpq_fx.facts import Choice, Site
from mpq_fx.formats import format_named
from mpq_fx.graph import arguments, insert_call, value
from mpq_fx.passes.rewrite.float_op import CAST, cast_to

aten = torch.ops.aten

INT8 = Choice("int8", "bfloat16")
INT4 = tuple(Choice(name, "bfloat16") for name in ("int4", "int4_asym", "int4_g32"))
CHOICES = (INT8, *INT4)

FEW_ROWS = 4  # up to here int8 weights alone beat bfloat16; above it they are several times slower
BLOCKS = (32, 64, 128, 256)  # values along K per scale that the int4 kernel knows
OUTPUTS = 16  # the int4 kernel packs rows of the weight by so many
MIDDLE = 8  # the int4 kernel counts codes from 0 and subtracts this


def refuse(site: Site, choice: Choice) -> Iterator[str]:
    """Why a weight-only choice cannot run here, or does not pay."""
    if rows_of(site) > FEW_ROWS:
        kind = choice.weight.partition("_")[0]
        yield f"{kind} weights alone pay for up to {FEW_ROWS} rows, and a call has {rows_of(site)}"
    if choice not in INT4:
        return
    fmt, (n, k) = format_named(choice.weight), site.weight_shape
    if k % fmt.block or fmt.block not in BLOCKS:
        yield f"the int4 kernel wants K in whole groups of {fmt.block}, and K is {k}"
    if n % OUTPUTS:
        yield f"the int4 kernel packs {OUTPUTS} outputs together, and there are {n}"


def rows_of(site: Site) -> int:
    """Rows of the activation, at the sizes of a call; a symbolic size counts as many."""
    sizes = [size if isinstance(size, int) else FEW_ROWS + 1 for size in site.input_shape[:-1]]
    return math.prod(sizes)


def lower_weight_only(node: Node) -> tuple[Node, str]:
    """x · ((codes - zero) · scale) + bias, in float32: bfloat16 rows would round scales as well."""
    x, _, _, w, sw, zw, bias, _, name, *_ = arguments(node)
    rows = insert_call(node, aten.reshape.default, (x, [-1, value(x).shape[-1]]))
    rows = cast_to(node, rows, torch.float32)
    rows = insert_call(node, aten.contiguous.default, (rows,))  # the kernels walk along K
    fmt = format_named(name)
    if fmt.element.bits == 8:
        scale = insert_call(node, aten.reshape.default, (sw, [-1]))
        y = insert_call(node, aten._weight_int8pack_mm.default, (rows, w, scale))
        callee = "aten._weight_int8pack_mm"
    else:
        packed, pairs = insert_call(node, PACK, (shifted(node, w), 1)), scale_pairs(node, sw, zw)
        args = (rows, packed, fmt.block, pairs)
        y = insert_call(node, aten._weight_int4pack_mm_for_cpu.default, args)
        callee = "aten._weight_int4pack_mm_for_cpu"
    y = insert_call(node, aten.reshape.default, (y, [*value(x).shape[:-1], value(w).shape[0]]))
    return (y if bias is None else insert_call(node, aten.add.Tensor, (y, bias))), callee


PACK: Any = aten._convert_weight_to_int4pack_for_cpu.default


def shifted(anchor: Node, codes: Node) -> Node:
    """int8 codes from -8 to 7 as int32 ones from 0 to 15"""
    wide = insert_call(anchor, CAST, (codes, torch.int32))
    return insert_call(anchor, aten.add.Tensor, (wide, MIDDLE))


def scale_pairs(anchor: Node, scale: Node, zero: Node) -> Node:
    """[N, K / block] scales and zero points -> [K / block, N, 2] of (scale, what code 8 stands for)

    Exact: a float16 times a code of 4 bits has few enough bits for float32.
    """
    scale = insert_call(anchor, CAST, (scale, torch.float32))
    middle = insert_call(
        anchor, aten.mul.Tensor, (insert_call(anchor, aten.neg.default, (zero,)), scale)
    )
    pairs = insert_call(anchor, aten.stack.default, ([scale, middle], -1))
    turned = insert_call(anchor, aten.permute.default, (pairs, [1, 0, 2]))
    return insert_call(anchor, aten.contiguous.default, (turned,))


def kernel(x: Tensor, w: Tensor, fmt_name: str) -> Callable[[], Tensor]:
    """One call on a weight of these sizes, for its time."""
    (n, k), fmt = w.shape, format_named(fmt_name)
    if fmt.element.bits == 8:
        codes, scales = w.to(torch.int8), torch.ones(n)
        return lambda: aten._weight_int8pack_mm(x, codes, scales)
    packed = PACK(torch.randint(0, 16, (n, k), dtype=torch.int32), 1)
    pairs = torch.ones(k // fmt.block, n, 2)
    return lambda: aten._weight_int4pack_mm_for_cpu(x, packed, fmt.block, pairs)
