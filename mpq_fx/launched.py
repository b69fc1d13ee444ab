"""torchrun -> a process group: nccl for a model on GPUs, gloo for any other"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def launched(make: Callable[[bool], tuple[Any, Any]]) -> Iterator[tuple[bool, tuple[Any, Any]]]:
    """(is this the first process, make(is this the first)), in a group of a launcher's processes.

    Each process has a GPU of its own as its present device before `make` moves a model there.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield True, make(True)
        return
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    is_first = int(os.environ["RANK"]) == 0
    made = make(is_first)
    net = made[0]
    is_on_gpu = isinstance(net, torch.nn.Module) and any(p.is_cuda for p in net.parameters())
    dist.init_process_group("nccl" if is_on_gpu else "gloo")
    try:
        yield is_first, made
    finally:
        dist.destroy_process_group()
