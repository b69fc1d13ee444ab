"""What the numbers of an error table depend on: two tunes that agree in it measure the same

The contents of weights and calls go in as digests, options as words.  Budgets, times and the number
of threads or processes are no part of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

import mpq_fx
from mpq_fx.binding import Binding
from mpq_fx.config import Config
from mpq_fx.facts import Identity
from mpq_fx.graph import name_of

if TYPE_CHECKING:
    from mpq_fx.compiler import Graph
    from mpq_fx.passes.analyze.metric import Task
    from mpq_fx.passes.analyze.replay import Replayer


def identity_of(graph: Graph, binding: Binding, config: Config, task: Task) -> Identity:
    """The model, the data, the options and the versions that a table is made of.

    All recorded calls are data: static ranges come from those that choose nothing.
    """
    weights = {graph.paths.get(name, name): t for name, t in binding.values().items()}
    return {
        "model": {
            "operations": _digest(_operations(task.replay)),
            **{name: _digest(_bytes(tensor)) for name, tensor in weights.items()},
        },
        "data": {
            **{f"call {k}": _digest(_contents(r)) for k, r in enumerate(binding.records)},
            **{f"loss of call {k}": value for k, value in enumerate(_losses(task))},
        },
        "options": {
            "sensitivity": config.sensitivity,
            "loss": "given" if task.losses else "none",
            "tied sites": " ".join(sorted("=".join(tie) for tie in task.ties)),
            "caches": " ".join(map(str, sorted(task.excluded))),
            "float32 matmul precision": torch.get_float32_matmul_precision(),
            "devices": " ".join(sorted({t.device.type for t in weights.values()})),
            **{
                f"choices of {binding.site_names.get(site, site)}": " ".join(c.name for c in kept)
                for site, kept in task.options.items()
            },
        },
        "versions": {"mpq-fx": mpq_fx.__version__, "torch": str(torch.__version__)},
    }


def _losses(task: Task) -> Iterator[str]:
    """The user's loss of the float model: what tells one loss, or one set of labels, from another.

    Only its leading digits: the number of threads is seen in the others.
    """
    for record, loss in zip(task.records, task.losses, strict=False):
        yield f"{float(loss(task.replay.run(record, {})).detach()):.4g}"


def _digest(parts: Iterator[Any]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _operations(replay: Replayer) -> Iterator[Any]:
    """The graph as words, with the values of the constants in it."""
    for node in replay.gm.graph.nodes:
        yield f"{node.name} {node.op} {_target(node)} {node.args} {node.kwargs}\n".encode()
        if node.op == "get_attr":
            yield from _contents([replay.constants[node]])


def _target(node: Node) -> str:
    """With the overload; a function by its name, for its text may hold an address."""
    is_op = isinstance(node.target, (str, torch._ops.OpOverload))
    return str(node.target) if is_op else name_of(node)


def _contents(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, Tensor):
            yield from _bytes(value)
        else:
            yield f"{value!r}\n".encode()


def _bytes(x: Tensor) -> Iterator[Any]:
    """dtype and shape, then the bytes of the elements."""
    yield f"{x.dtype} {tuple(x.shape)}\n".encode()
    yield x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
