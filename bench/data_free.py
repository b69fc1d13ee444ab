"""Plans from inputs that a net's own weights make, beside plans from real ones and from noise.

    python bench/data_free.py cnn resnet mobilenet text minilm [--seeds 2]

Two questions, both of the reference target, for the least size.  "static": every layer in int8 with
static scales, so that the error is that of the ranges.  "held": a tolerance is to be kept, with
bfloat16 and int8 to choose from; what a plan claims is its error on its own inputs.  Real errors
are those on batches that no plan saw, the worst of them; every figure is the mean over seeds.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from statistics import mean

import torch
from results import parser
from trained import CALLS, NETS, Net

import mpq_fx
from mpq_fx import synthetic
from mpq_fx.demo.nets import Batch
from mpq_fx.numerics import relative_rms

STATIC, DYNAMIC = "int8*uint8_tensor/static", "int8/dynamic"
TOLERANCES = {"cnn": 0.005, "resnet": 0.005, "mobilenet": 0.01, "text": 0.02, "minilm": 0.02}
CONFIGS = {
    "static": lambda net: mpq_fx.Config(
        target="reference", objective="size", tolerance=10.0, formats=[STATIC]
    ),
    "held": lambda net: mpq_fx.Config(
        target="reference",
        objective="size",
        tolerance=TOLERANCES[net.name],
        formats=["bfloat16", STATIC, *([DYNAMIC] if is_of_tokens(net) else [])],
    ),
}
HEAD = (
    "| net | inputs | question | claimed | real error | score (float's) | weights |\n"
    "|---|---|---|---:|---:|---:|---:|"
)
Inputs = Callable[[int], Sequence[Batch]]  # of a seed


@dataclass(frozen=True)
class Result:
    """Of one plan."""

    claimed: float
    error: float
    score: float
    weight_bytes: float


def is_of_tokens(net: Net) -> bool:
    return not net.pool[0].is_floating_point()


def inputs_of(net: Net) -> Mapping[str, Inputs]:
    """What there is to calibrate with, by name."""
    found: dict[str, Inputs] = {"real": net.calibration}
    rows, shape = net.pool[0], (net.size, *net.pool[0].shape[1:])
    if is_of_tokens(net):
        return found | {
            "random tokens": lambda seed: synthetic.random_tokens(net.model, shape, seed=seed)
        }
    level, spread = float(rows.mean()), float(rows.std())
    distilled = partial(synthetic.distilled, net.model, shape)
    return found | {
        "distilled": lambda seed: distilled(seed=seed),
        "distilled, 8 batches": lambda seed: distilled(seed=seed, count=8),
        "distilled, input of mean 0, deviation 1": lambda seed: distilled(seed=seed, mean=0.0),
        "distilled, input of the data's": lambda seed: distilled(seed=seed, mean=level, std=spread),
        "noise of mean 0, deviation 1": partial(noise, shape, 0.0, 1.0),
        "noise like the data": partial(noise, shape, level, spread),
    }


def noise(shape: tuple[int, ...], level: float, spread: float, seed: int) -> list[Batch]:
    draw = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=draw) * spread + level,) for _ in range(CALLS)]


def judged(net: Net, batches: Sequence[Batch], config: mpq_fx.Config) -> Result:
    """Tune with some batches, run the plan on those that nobody saw."""
    plan = mpq_fx.tune(net.model, batches, config=config, progress=False)
    run = mpq_fx.apply(net.model, plan, config=mpq_fx.Config(target="reference"))
    with torch.inference_mode():
        outputs = [run(*batch) for batch in net.measured]
        references = [net.model(*batch) for batch in net.measured]
    torch.compiler.reset()
    error = max(relative_rms(y, ref) for y, ref in zip(outputs, references, strict=True))
    score = net.score(torch.cat(outputs), torch.cat(references))
    return Result(plan.error, error, score, sum(row.weight_bytes for row in plan.ledger))


def compare(net: Net, seeds: int) -> None:
    """One line for each kind of inputs and each question."""
    with torch.inference_mode():
        reference = torch.cat([net.model(*batch) for batch in net.measured])
    own = net.score(reference, reference)
    made = {kind: [*map(make, range(seeds))] for kind, make in inputs_of(net).items()}
    for (kind, sets), (question, config) in itertools.product(made.items(), CONFIGS.items()):
        found = [astuple(judged(net, batches, config(net))) for batches in sets]
        claimed, error, score, size = map(mean, zip(*found, strict=True))
        print(
            f"| {net.name} | {kind} | {question} | {claimed:.4f} | {error:.4f} | "
            f"{score:.4f} ({own:.4f}) | {size / 1e3:.0f} kB |",
            flush=True,
        )


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("nets", nargs="+", choices=TOLERANCES)
    made.add_argument("--seeds", type=int, default=2)
    options = made.parse_args(arguments)
    torch.set_num_threads(options.threads)
    logging.getLogger("mpq_fx").setLevel(logging.ERROR)  # each plan warns of what it is made from
    print(HEAD)
    for name in options.nets:
        compare(NETS[name](), options.seeds)


if __name__ == "__main__":
    main()
