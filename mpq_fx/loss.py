"""loss(output, batch) of the user  ->  loss(outputs of the graph), for each recorded call

The compiled model is called again with the batch that a record came from, and its graph answers
with the outputs under test; what the user's code makes of them, Dynamo's own code for structures
included, runs in eager mode with gradients on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mpq_fx.batch import call, inputs_of
from mpq_fx.errors import CalibrationError, ConfigError, UnsupportedError
from mpq_fx.passes.analyze.replay import is_measurable, replayer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mpq_fx.binding import Binding
    from mpq_fx.lifecycle import Lifecycle

Loss = Callable[[Any, Any], Tensor]  # output of the model, batch as it was given -> a scalar
Found = Sequence[tuple["Lifecycle", "Binding"]]
SUBSTITUTE = 'sensitivity="interlayer_hessian", which needs no loss'


def checked(loss: Loss, output: Any, batch: Any, index: int) -> Tensor:
    """loss(output, batch), or what is wrong with it; the user's own exceptions pass."""
    value = loss(output, batch)
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        shown = (
            f"a {value.dtype} tensor of shape {tuple(value.shape)}"
            if isinstance(value, Tensor)
            else f"{type(value).__name__}"
        )
        raise ConfigError(
            f"the loss of batch {index} is {shown}, not a floating tensor of one number",
            fix="return for example torch.nn.functional.cross_entropy(output, batch['labels'])",
        )
    if not bool(torch.isfinite(value).all()):
        raise CalibrationError(
            f"the loss of batch {index} is {float(value)} on the float model",
            fix="leave that batch out, or use a loss that is finite there",
        )
    return value.reshape(())


@dataclass(frozen=True)
class Source:
    """The user's loss, and which batch each recorded call of each graph came from."""

    loss: Loss
    model: torch.nn.Module
    compiled: Any
    batches: Sequence[Any]
    of: dict[int, list[int]] = field(default_factory=dict)  # id(binding) -> batch of each record
    calls: dict[int, int] = field(default_factory=dict)  # id(binding) -> how many it has had

    def note(self, index: int, output: Any, found: Found) -> None:
        """Batch `index` was given: is its loss usable, was it one call, which binding kept it?"""
        checked(self.loss, output, self.batches[index], index)
        made = {id(b): b.calls - self.calls.get(id(b), 0) for _, b in found}
        self.calls.update({id(b): b.calls for _, b in found})
        if sum(made.values()) > 1:
            graphs = sum(count > 0 for count in made.values())
            what = f"{graphs} graphs" if graphs > 1 else f"one graph {sum(made.values())} times"
            raise UnsupportedError(
                f"batch {index} ran {what}; a loss is expanded around the outputs of one call of "
                "one graph",
                fix=f"remove the graph break or the loop around the layers, or {SUBSTITUTE}",
            )
        for _, binding in found:
            known = self.of.setdefault(id(binding), [])
            known += [index] * (len(binding.records) - len(known))

    def hand_over(self, found: Found) -> None:
        """Each binding gets the loss of each of its records."""
        for _, binding in found:
            indexes = self.of.get(id(binding), [])
            assert len(indexes) == len(binding.records)
            binding.losses = tuple(partial(self._of_outputs, found, k) for k in indexes)

    def _of_outputs(self, found: Found, index: int, outputs: Sequence[Any]) -> Tensor:
        """The loss of batch `index`, had the graph given these outputs."""
        batch, asked = self.batches[index], list[int]()
        with ExitStack() as stack:
            for lifecycle, binding in found:
                stack.enter_context(_answered(lifecycle, binding, outputs, asked))
            stack.enter_context(torch.compiler.set_stance("eager_on_recompile"))
            stack.enter_context(torch.no_grad())  # as it was observed
            output = call(self.compiled, inputs_of(self.model, batch))
        if len(asked) != 1:
            raise UnsupportedError(
                f"batch {index} was observed in one call of a graph and now ran {len(asked)}",
                fix=f"call tune outside of autocast and of other modes, or {SUBSTITUTE}",
            )
        with torch.enable_grad():
            return checked(self.loss, output, batch, index)


@contextmanager
def _answered(
    lifecycle: Lifecycle, binding: Binding, outputs: Sequence[Any], asked: list[int]
) -> Iterator[None]:
    """Calls of a binding answered with the floating outputs under test, and its own others.

    It may be the binding of another shape of the same code: Dynamo takes the newest that fits.
    """

    def answer(args: Sequence[Any]) -> list[Any]:
        asked.append(1)
        graph = lifecycle.graph
        own = replayer(graph.gm, graph.sites, binding.values()).run(args, {})
        torch.set_grad_enabled(True)  # for what follows in the user's code; `no_grad` ends it
        return _substituted(own, outputs)

    binding.trial = answer
    try:
        yield
    finally:
        binding.trial = None


def _substituted(own: Sequence[Any], outputs: Sequence[Any]) -> list[Any]:
    """(y, 3, z), (a, b) -> (a, 3, b): floating outputs in order, in place of a call's own."""
    given = [y for y in outputs if is_measurable(y)]
    shapes = [tuple(y.shape) for y in own if is_measurable(y)]
    if shapes != [tuple(y.shape) for y in given]:
        raise UnsupportedError(
            f"one batch has outputs of shapes {shapes} where its record has "
            f"{[tuple(y.shape) for y in given]}",
            fix=f"give batches of one shape, or {SUBSTITUTE}",
        )
    left = iter(given)
    return [next(left) if is_measurable(y) else y for y in own]
