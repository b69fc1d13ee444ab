"""mpq::embedding(i, w)  ->  mpq_triton::embedding(i, pack(w))"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import GraphModule, Node

import mpq_fx.kernels  # noqa: F401 - defines torch.ops.mpq
from mpq_fx.formats import format_named
from mpq_fx.graph import arguments, insert_call, value
from mpq_fx.kernels.embedding import triton as kernel
from mpq_fx.passes.lower.kernel import Kernel

mpq, mpq_triton = torch.ops.mpq, torch.ops.mpq_triton


def embedding_kernel(target: str) -> Kernel:
    return Kernel(target, mpq.embedding.default, refuse, lower)


def refuse(node: Node) -> Iterator[str]:
    return kernel.refuse(format_named(arguments(node)[4]))


def lower(gm: GraphModule, node: Node) -> Node:
    indices, w, scale, zero, name, dtype = arguments(node)
    packed = insert_call(node, mpq_triton.embedding_pack.default, (w, name))
    zero = None if format_named(name).symmetric else zero
    args = (indices, packed, scale, zero, value(w).shape[1], name, dtype)
    return insert_call(node, mpq_triton.embedding.default, args)
