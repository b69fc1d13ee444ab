"""observe -> solve -> run, per binding: what happens on each call of one compiled graph."""

from __future__ import annotations

import logging
import operator
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from mpq_fx.binding import RECORD_BYTES, Binding, bind, copied, record_bytes, sizes_of
from mpq_fx.config import Config
from mpq_fx.errors import MpqError, WeightError, first_line
from mpq_fx.facts import Site
from mpq_fx.watch import Stamp, stamp

if TYPE_CHECKING:
    from mpq_fx.compiler import Graph
    from mpq_fx.passes.analyze.work import Work
    from mpq_fx.search import Judge
    from mpq_fx.shapes import Code

log = logging.getLogger("mpq_fx")
T = TypeVar("T")


class Known(weakref.WeakSet[T]):
    """A WeakSet that may grow in one thread while another one iterates over what was there."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        super().__init__()

    def add(self, item: T) -> None:
        with self._lock:
            super().add(item)

    def discard(self, item: T) -> None:
        with self._lock:
            super().discard(item)

    def __iter__(self) -> Iterator[T]:
        with self._lock:
            found = list(super().__iter__())
        return iter(found)


LIFECYCLES: Known[Lifecycle] = Known()
OBSERVING = "observing"
INTERRUPTED = "planning was interrupted; mpq_fx.finalize(model) begins again"
FREED = "this call needs the float weights, which apply(release=True) freed"
PATIENCE = 8  # times calibration_calls without enough distinct ones: say so


class Lifecycle:
    """The callable that Dynamo keeps for one graph; calls look up their binding and run it."""

    def __init__(
        self,
        graph: Graph,
        run_float: Callable[..., Any],
        config: Config,
        *,
        optimize: Callable[..., None] | None = None,
        welcome: Callable[[Lifecycle, Binding], None] | None = None,
        reason: str = "",
    ) -> None:
        self.graph, self.run_float, self.config, self.reason = graph, run_float, config, reason
        self.sites: tuple[Site, ...] = graph.sites
        self.bindings: dict[tuple[int, ...], Binding] = {}
        self._optimize, self._welcome = optimize, welcome
        self._fixed = frozenset(graph.parameters)
        self._pick = operator.itemgetter(*graph.parameters) if graph.parameters else None
        self._lock = threading.RLock()
        LIFECYCLES.add(self)

    def __call__(self, *args: Any) -> Any:
        parameters = self._parameters(args)
        binding = self._find(parameters)
        if binding.trial is not None:
            return binding.trial(args)
        if binding.installed is None and binding.reason == OBSERVING:
            self._observe(binding, args)
        if binding.installed is not None:
            return self._run(binding, parameters, args)
        return self._run_float(binding, args)

    def finalize(
        self,
        binding: Binding,
        judge: Judge | None = None,
        others: Sequence[Code] = (),
        work: Work | None = None,
    ) -> None:
        """Solve with what was seen.

        Whatever goes wrong, the binding runs on in float, and no later call tries again by itself;
        after Ctrl-C the calls that were seen are kept for a next time.
        """
        with binding.lock:
            if binding.reason not in (OBSERVING, INTERRUPTED) or self._optimize is None:
                return
            before, binding.reason = stamps(binding), "solving"
            try:
                self._optimize(binding, self.config, judge, others, work)
            except Exception as error:  # the user's mistake, or that of a compiler, or no memory
                failure = _failed(binding, error, before)
                if self.config.on_error == "raise":
                    raise failure from failure.__cause__
                log.warning("staying in float: %s", failure)
            except BaseException:
                binding.installed, binding.reason = None, INTERRUPTED
                raise

    def _parameters(self, args: Sequence[Any]) -> tuple[Tensor, ...]:
        if self._pick is None:
            return ()
        return self._pick(args) if len(self._fixed) > 1 else (self._pick(args),)

    def _find(self, parameters: tuple[Tensor, ...]) -> Binding:
        """The binding of these very tensors: ids tell while none of them died."""
        key = tuple(map(id, parameters))
        binding = self.bindings.get(key)
        if binding is not None and not binding.orphaned:
            return binding
        with self._lock:
            return self._rebind(key, parameters)

    def _rebind(self, key: tuple[int, ...], parameters: tuple[Tensor, ...]) -> Binding:
        """A new binding, or the old one where dead parameters were replaced (assign=True)."""
        for old_key, old in list(self.bindings.items()):
            pairs = list(zip(old.parameters, parameters, strict=True))
            if all(ref() is None or ref() is p for ref, p in pairs):
                del self.bindings[old_key]
                if any(ref() is p for ref, p in pairs) or len(pairs) == 1:
                    return self._adopt(key, old, parameters)
        names = [self.graph.names[k] for k in self.graph.parameters]
        binding = bind(names, parameters, {site.name: site.name for site in self.sites})
        if self.reason or not self.sites:
            binding.reason = self.reason or "nothing here can run in another precision"
        if self._welcome is not None:
            self._welcome(self, binding)
        self.bindings[key] = binding  # last: a call that raised is refused again
        return binding

    def _adopt(self, key: tuple[int, ...], old: Binding, parameters: tuple[Tensor, ...]) -> Binding:
        old.adopt(parameters)
        self.bindings[key] = old
        old.refresh()
        return old

    def _run(self, binding: Binding, parameters: tuple[Tensor, ...], args: Sequence[Any]) -> Any:
        installed = binding.installed
        assert installed is not None
        binding.freshen(parameters)
        if not installed.accepts(args):
            return self._run_float(binding, args)
        return installed.run(*[args[k] for k in installed.live], *installed.passed)

    def _run_float(self, binding: Binding, args: Sequence[Any]) -> Any:
        if binding.released:
            raise MpqError(FREED, fix="apply the plan without release=True")
        return self.run_float(*args)

    def _observe(self, binding: Binding, args: Sequence[Any]) -> None:
        """Keep the inputs of a call that tells something new; solve when there are enough."""
        if not binding.lock.acquire(blocking=False):
            return  # another thread observes or solves: run on in float
        try:
            if binding.reason == OBSERVING:
                self._keep(binding, self._record(args))
                self._solve_if_ready(binding)
        finally:
            binding.lock.release()

    def _keep(self, binding: Binding, record: tuple[Any, ...]) -> None:
        binding.calls += 1
        binding.shapes[sizes_of(record)] += 1
        if not is_telling(record) or any(_equal(record, r) for r in binding.records):
            return
        kept = sum(map(record_bytes, binding.records))
        if not binding.records or kept + record_bytes(record) <= RECORD_BYTES:
            binding.records.append(record)

    def _solve_if_ready(self, binding: Binding) -> None:
        enough, seen = self.config.calibration_calls, len(binding.records)
        if seen >= enough:
            log.info(
                "calibrated with %d calls; solving for at most %.0f s",
                seen,
                self.config.time_budget,
            )
            self.finalize(binding)
        elif binding.calls == PATIENCE * enough:
            log.warning(
                "only %d of %d calls were distinct, so mpq still observes; "
                "mpq_fx.finalize(model) plans with those",
                seen,
                binding.calls,
            )

    def _record(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """Copies of the arguments that are not parameters; a mutated buffer is copied too."""
        with torch.inference_mode(False), torch.no_grad():
            return tuple(None if k in self._fixed else _copy(arg) for k, arg in enumerate(args))


def stamps(binding: Binding) -> dict[str, Stamp]:
    return {name: stamp(tensor) for name, tensor in binding.values().items()}


def _failed(binding: Binding, error: Exception, before: Mapping[str, Stamp]) -> Exception:
    """Run on in float; the error to raise.

    Of weights that another thread edited meanwhile some of the numbers are from before, and others
    from after the edit: what failed then may work with the calls that were seen.
    """
    if stamps(binding) == before:
        binding.keep_float(error.what if isinstance(error, MpqError) else first_line(error))
        return error
    binding.installed, binding.reason = None, INTERRUPTED
    edited = WeightError(
        f"weights were edited while their plan was made: {first_line(error)}",
        fix="mpq_fx.finalize(model) when no thread edits them",
    )
    edited.__cause__ = error
    return edited


def is_telling(record: Sequence[Any]) -> bool:
    """Does a call say anything about the data: some tensor that is not one value repeated, and
    none that is broken?
    """
    tensors = [x for x in record if isinstance(x, Tensor) and not x.is_meta]
    if any(x.is_floating_point() and not _is_data(x) for x in tensors):
        return False
    if any(x.numel() == 0 for x in tensors):
        return False
    return not tensors or any(x.numel() == 1 or bool((x != x.flatten()[0]).any()) for x in tensors)


def _is_data(x: Tensor) -> bool:
    """All finite, or an additive mask: -inf at some places, and nothing above zero."""
    return bool(torch.isfinite(x).all()) or bool((x <= 0).all())  # NaN is not <= 0


def _copy(arg: Any) -> Any:
    return copied(arg.detach()) if isinstance(arg, Tensor) else arg


def _equal(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return all(
        (x.shape == y.shape and torch.equal(x, y)) if isinstance(x, Tensor) else x == y
        for x, y in zip(a, b, strict=True)
    )
