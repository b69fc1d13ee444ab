"""µs per call = (lifecycle - bare compiled function) / watched tensors

    python bench/overhead.py [--save]

A chain of equal linear layers under a plan of least size, so that every weight is watched.  `bare`
calls what was compiled, `watch` only looks at the weights, `lifecycle` is a whole call through mpq.
`float` is a call of the model as Inductor compiles it, `observing` the same while inputs are kept.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from results import add_section, check_machine, parser
from torch import Tensor, nn
from worker import timed

LAYERS = (4, 16, 48)
WIDTH = 64
CALLS = 400
CALIBRATION_CALLS = 3


def measure(layers: int, *, calls: int = CALLS, target: str = "auto") -> dict[str, float]:
    """Microseconds per call of one chain, and how many tensors are watched."""
    from mpq_fx.registry import bindings_of

    options: dict[str, Any] = {
        "objective": "size",
        "tolerance": 1.0,
        "calibration_calls": CALIBRATION_CALLS,
        "target": target,
    }
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        options["cache_dir"] = folder
        compiled = torch.compile(chain(layers), backend="mpq", options=options)
        observed = while_observing(compiled, calls)
        for seed in range(CALIBRATION_CALLS):
            compiled(inputs(seed))
        ((lifecycle, binding),) = bindings_of(compiled)
        installed, watch = binding.installed, binding.watch
        if installed is None or watch is None:
            raise RuntimeError(f"the chain stayed in float: {binding.reason}")
        values = binding.values()
        names = lifecycle.graph.names
        arguments = [values.get(name, inputs(CALIBRATION_CALLS)) for name in names]
        watched = [values[name] for name in binding.watched]
        live = [arguments[k] for k in installed.live]
        times = in_turn(
            {
                "bare": lambda: installed.run(*live, *installed.passed),
                "watch": lambda: watch.changed(watched),
                "lifecycle": lambda: lifecycle(*arguments),
            },
            calls,
        )
    return {"layers": layers, "watched": len(watched), **times, **observed}


def while_observing(compiled: Callable[..., Any], calls: int) -> dict[str, float]:
    """Microseconds of a call that is kept, beside one that is not; nothing is planned yet."""
    from mpq_fx.registry import bindings_of

    compiled(inputs(0))
    ((lifecycle, binding),) = bindings_of(compiled)
    values = binding.values()
    arguments = [values.get(name) for name in lifecycle.graph.names]
    at = arguments.index(None)
    fresh = (inputs(seed) for seed in range(1, calls + 2))

    def observe() -> None:
        del binding.records[1:]  # as many as before each call: one, to compare with
        binding.calls = 1
        arguments[at] = next(fresh)
        lifecycle(*arguments)

    given = [inputs(0) if value is None else value for value in arguments]
    found = in_turn({"float": lambda: lifecycle.run_float(*given), "observing": observe}, calls)
    binding.records.clear()
    return found


def in_turn(functions: dict[str, Callable[[], Any]], calls: int) -> dict[str, float]:
    """{name: median µs}; every function is called once per round, after one warm round."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for run in functions.values():
        run()
    for _ in range(calls):
        for name, run in functions.items():
            times[name].append(timed(run) * 1e3)
    return {name: statistics.median(found) for name, found in times.items()}


def per_tensor(found: Sequence[dict[str, float]]) -> dict[str, float]:
    """Least squares over the chains: lifecycle - bare = fixed + each · watched"""
    extra = [(row["watched"], row["lifecycle"] - row["bare"]) for row in found]
    each, fixed = statistics.linear_regression(*zip(*extra, strict=True))
    return {"fixed_us": fixed, "per_tensor_us": each}


def chain(layers: int) -> nn.Module:
    torch.manual_seed(0)
    parts = [part for _ in range(layers) for part in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return nn.Sequential(*parts).eval().requires_grad_(False)


def inputs(seed: int) -> Tensor:
    return torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(seed))


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__).parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.save:
        check_machine(options.threads)
    found = []
    for layers in LAYERS:
        found.append(measure(layers))
        print("  ".join(f"{name} {value:.1f}" for name, value in found[-1].items()), flush=True)
    summary = per_tensor(found)
    print("  ".join(f"{name} {value:.2f}" for name, value in summary.items()))
    if options.save:
        add_section("overhead", {"chains": found, **summary}, threads=options.threads)


if __name__ == "__main__":
    main()
