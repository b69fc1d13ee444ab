"""together() -> Processes: those that tune one model together, and what they tell each other

All of them do the same steps, and each `exchange` is made by all, in one order.  Where one fails it
still makes its next exchange, to say so, and all of them end.  One that dies closes its connections
and one that hangs is waited for no longer than a limit: both end the others too.

Messages are Python objects in a gloo group of their own, whatever the group of the caller is (nccl,
for a model on GPUs): they are numbers in main memory, and gloo tells of a process that died.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from mpq_fx.checkpoint import described
from mpq_fx.errors import ProcessError, first_line
from mpq_fx.facts import Identity

log = logging.getLogger("mpq_fx")
Gather = Callable[[Any], list[Any]]  # what each process gives, by rank, to all
PATIENCE = timedelta(days=7)  # for the first process, which solves, compiles and asks the metric
SOURCE = re.compile(r"^\[\S+:\d+\] ")  # where in gloo a message comes from
DONE, FAILED = "done", "failed"
DIFFERENT = "the processes do not tune the same"
SAME = "the same model, batches and options in every process"


class Processes:
    """One of `size` processes.  `prompt` has a limit in time, `patient` has next to none."""

    def __init__(self, rank: int, size: int, prompt: Gather, patient: Gather) -> None:
        self.rank, self.size = rank, size
        self._prompt, self._patient, self._gather = prompt, patient, prompt

    def exchange(self, topic: str, value: Any) -> list[Any]:
        """What all processes give, by rank.  ProcessError where one of them failed."""
        if self.size == 1:
            return [value]
        try:
            found = self._gather((DONE, topic, value))
        except RuntimeError as error:  # a connection that closed, or a limit that is over
            raise ProcessError(
                f"process {self.rank} of {self.size} lost another one at {topic!r}: "
                f"{SOURCE.sub('', first_line(error))}",
                fix="look for what the others printed last; the first process keeps a checkpoint",
            ) from error
        for rank, (state, _, what) in enumerate(found):
            if state == FAILED:
                raise ProcessError(f"process {rank} of {self.size} failed: {what}")
        topics = [theirs for _, theirs, _ in found]
        if len(set(topics)) > 1:
            raise ProcessError(f"{DIFFERENT}: they are at {', '.join(topics)}", fix=SAME)
        return [value for _, _, value in found]

    def agree(self, identity: Identity) -> None:
        """ProcessError, in all processes, where one of them has another identity."""
        first, *others = self.exchange("what is tuned", identity)
        for rank, theirs in enumerate(others, 1):
            if different := described(first, theirs):
                raise ProcessError(f"{DIFFERENT}: {rank} differs from 0", at=different, fix=SAME)

    def rest(self) -> None:
        """From here on only the first process works, and the others wait as long as it takes."""
        self._gather = self._patient

    def awaited(self, value: Any = None) -> Any:
        """What the first process gives, after which all work again."""
        found = self.exchange("next", value)[0]
        self._gather = self._prompt
        return found

    def tell(self, error: BaseException) -> None:
        """Make the next exchange say that this process failed, and why."""
        with suppress(RuntimeError):  # nobody is left to be told
            self._gather((FAILED, "", str(error).strip() or type(error).__name__))


ALONE = Processes(0, 1, lambda value: [value], lambda value: [value])


@contextmanager
def together(limit: float, *, alone: bool = False) -> Iterator[Processes]:
    """The processes of the caller's torch.distributed group; one where there is none.

    `limit` is for how many seconds one is waited for.  An error of one of them ends all.
    """
    import torch.distributed as dist

    is_group = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if alone or not is_group:
        yield ALONE
        return
    with _joined(limit) as processes:
        try:
            yield processes
        except ProcessError:
            raise  # all of them know
        except Exception as error:
            processes.tell(error)
            raise


@contextmanager
def _joined(limit: float) -> Iterator[Processes]:
    import torch.distributed as dist

    rank, size = dist.get_rank(), dist.get_world_size()
    log.info("process %d of %d waits for the others to tune together", rank, size)
    groups: list[Any] = []
    try:
        for wait in (timedelta(seconds=limit), PATIENCE):
            groups.append(_group(wait, size))
        yield Processes(rank, size, *(_gather_in(group, size) for group in groups))
    finally:
        for group in groups:
            dist.destroy_process_group(group)


def _group(limit: timedelta, size: int) -> Any:
    import torch.distributed as dist

    try:
        return dist.new_group(backend="gloo", timeout=limit)
    except dist.DistStoreError as error:
        raise ProcessError(
            f"not all of the {size} processes came to tune together within "
            f"{limit.total_seconds():.0f} s",
            fix="call mpq_fx.tune in each of them, or with alone=True in one",
        ) from error


def _gather_in(group: Any, size: int) -> Gather:
    import torch.distributed as dist

    def gather(value: Any) -> list[Any]:
        found = [None] * size
        dist.all_gather_object(found, value, group=group)
        return found

    return gather
