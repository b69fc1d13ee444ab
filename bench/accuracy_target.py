"""As fast as 99.99 % of the float accuracy allows, against the same net in bfloat16.

    python bench/accuracy_target.py vit [--search bisection,greedy,solver]

The protocol of the inter-layer augmented Hessian (arXiv 2306.04879), with its order of layers and
its bisection, beside mpq-fx's own solver.  One half of the unseen batches answers the search, the
other half is for the accuracies that are printed.  Latencies are of the very plan whose accuracy
stands beside them, by turns with the best that Inductor makes of the net in bfloat16 and in float.
A drop of less than 1 / n cannot be seen on n examples: 99.99 % then means that none is lost.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from results import parser
from trained import NETS, Net

import mpq_fx
from mpq_fx.demo.nets import Subject
from mpq_fx.demo.variants import MODES, Variant, caller, inductor, many_variants
from mpq_fx.facts import INDUCTOR
from mpq_fx.verify import race

KEPT = 0.9999
METRIC = "interlayer_hessian"
SEARCHES = ("bisection", "greedy", "solver")
DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Reached:
    """A plan that keeps the accuracy on the guiding half, and what it is on the other."""

    net: Net
    search: str
    guiding: float  # scores of the compiled plan as shares of the float net's
    judging: float
    examples: int  # in each half
    ms: float
    bfloat16_ms: float
    float_ms: float
    precisions: str

    def __str__(self) -> str:
        return (
            f"| {self.net.name} | {self.search} | {self.examples} | {self.guiding:.4%} |"
            f" {self.judging:.4%} | {self.ms:.2f} | {1 - self.ms / self.bfloat16_ms:+.1%} |"
            f" {1 - self.ms / self.float_ms:+.1%} | {self.precisions} |"
        )


HEAD = (
    "| net | search | n | guiding half | other half | ms | less than bfloat16 | less than float |"
    " sites |\n|---|---|---:|---:|---:|---:|---:|---:|---|"
)


def halves(net: Net) -> tuple[Net, Net]:
    """The net with the unseen batches that answer the search, and with those that judge it."""
    middle = len(net.measured) // 2
    rows = sum(len(batch[0]) for batch in net.measured[:middle])
    return (
        replace(net, measured=net.measured[:middle], answers=net.answers[:rows]),
        replace(net, measured=net.measured[middle:], answers=net.answers[rows:]),
    )


def outputs(net: Net, model: Callable[..., Any]) -> torch.Tensor:
    with torch.inference_mode():
        return torch.cat([model(*batch) for batch in net.measured])


def reached(net: Net, search: str, seconds: float) -> Reached:
    """Tune with one half of the unseen batches, run the compiled plan on both."""
    guide, judge = halves(net)
    references = {half: outputs(half, net.model) for half in (guide, judge)}

    def kept(half: Net, model: Callable[..., Any]) -> float:
        return half.score(outputs(half, model), references[half])

    config = mpq_fx.Config(
        target="cpu", sensitivity=METRIC, search=search, time_budget=seconds, tolerance=0.5
    )
    plan = mpq_fx.tune(
        net.model,
        net.calibration(0),
        metric=lambda model: kept(guide, model),
        max_drop=1 - KEPT,
        config=config,
        progress=False,
    )
    compiled = mpq_fx.apply(net.model, plan)
    shares = [kept(half, compiled) / kept(half, net.model) for half in (guide, judge)]
    used = Counter(choice.name for choice in plan.choices.values())
    precisions = ", ".join(f"{count} {name}" for name, count in used.most_common())
    if plan.winner == INDUCTOR:
        precisions = f"float won the race; planned were {precisions}"
    return Reached(net, search, *shares, judge.examples, *times(net, compiled), precisions)


def times(net: Net, compiled: Callable[..., Any]) -> list[float]:
    """Median ms of the plan, and of the best that Inductor makes of the net in each float type."""
    subject = Subject(net.name, "", net.model, (), net.measured, lambda y, ref: {})
    batch = net.measured[0]
    calls = {"plan": caller(Variant("plan", compiled), batch)}
    for dtype, mode in itertools.product(DTYPES, MODES):
        variant = inductor(subject, dtype, mode)
        calls[f"{dtype} {mode}"] = caller(variant, batch)
    with torch.inference_mode():
        found = {name: timing.median for name, timing in race(calls, rounds=200).items()}
    best = [min(ms for n, ms in found.items() if n.startswith(str(d))) for d in DTYPES]
    return [found["plan"], *best]


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("nets", nargs="+", choices=NETS)
    made.add_argument("--search", default=",".join(SEARCHES))
    made.add_argument("--seconds", type=float, default=300.0, help="time budget of a tune")
    options = made.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print(HEAD)
    searches = options.search.split(",")
    with many_variants(len(DTYPES) * len(MODES) * len(searches) * len(options.nets) + 16):
        for name, search in itertools.product(options.nets, searches):
            print(reached(NETS[name](), search, options.seconds), flush=True)


if __name__ == "__main__":
    main()
