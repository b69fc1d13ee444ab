"""argmin over x of Σ over batch norms of ‖μ(x) − running mean‖² + ‖σ(x) − running deviation‖²

μ, σ: per channel, of what a batch norm reads, over the batch and all positions: what its running
statistics are of.  Adam on x alone, the learning rate cut on a plateau; the best x of all steps is
kept.  ZeroQ (arXiv 2001.00281); its published code takes μ and σ of each image, which means little
where a map has few positions, and holds the input to mean 0 and deviation 1, which harms where it
is normalized otherwise (docs/data_free.md).  Here such a term is added if `mean` is given.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mpq_fx.errors import CalibrationError, ConfigError, WeightError
from mpq_fx.progress import progress_bar
from mpq_fx.registry import root_of
from mpq_fx.synthetic.origin import Arguments, Origin
from mpq_fx.synthetic.probe import (
    OWN_BATCHES,
    accepted,
    check_positive,
    home_of,
    is_required,
    parameters_of_forward,
    sizes_of,
    undisturbed,
)

log = logging.getLogger("mpq_fx")
PATIENCE, FLOOR, FACTOR = 100, 1e-4, 0.1  # of the learning rate: steps without gain, least, cut
EPSILON = 1e-6  # under the root of a variance
PER_INSTANCE = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)  # their own statistics
WORDS = "distilled from batch norm statistics"


@dataclass(frozen=True)
class Target:
    """What one batch norm, or the input itself, should read."""

    name: str
    mean: Tensor  # [C] or []
    deviation: Tensor


def distilled(  # noqa: PLR0913 -- options of the user, all by name
    model: nn.Module,
    shape: Sequence[int],
    *,
    count: int = 4,
    steps: int = 500,
    learning_rate: float = 0.5,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] = 1.0,
    seed: int = 0,
    progress: bool = False,
) -> list[Arguments]:
    """`count` batches x of `shape` that the model's batch norms take for training data.

    `shape` has the batch first: (32, 3, 224, 224).  `mean` and `std`, where known, are what the
    input is normalized to, one number or one per channel; else the batch norms alone shape it.  The
    time is that of count × steps training steps.  The model stays as it is, on its own device.
    Raises CalibrationError for a model without batch norm, or whose batch norms the input does not
    reach, ConfigError for one of several inputs.
    """
    sizes = sizes_of(shape)
    check_positive(count=count, steps=steps, learning_rate=learning_rate)
    _check_one_input(model)
    device, dtype = home_of(model)
    layers = batch_norms(model)
    wanted = _input_target(mean, std, sizes[1], device)
    draw = torch.Generator().manual_seed(seed)
    batches = []
    with undisturbed(model) as run, progress_bar(progress) as bar, torch.enable_grad():
        with torch.no_grad(), accepted(model, "an input", sizes):
            run(torch.zeros(sizes, device=device, dtype=dtype))
        task = bar.add_task("distilling", total=count * steps)
        loss_of = partial(_loss, run, layers, wanted, dtype)
        for _ in range(count):
            start = _by_channel(torch.randn(sizes, generator=draw).to(device), wanted)
            x, losses = _descend(start, loss_of, steps, learning_rate, partial(bar.advance, task))
            facts = {"seed": seed, "steps": steps, "loss": losses}
            batches.append(Arguments((x.to(dtype),), Origin("distilled", WORDS, facts)))
    return batches


def batch_norms(model: nn.Module) -> dict[nn.Module, Target]:
    """Every batch norm with running statistics and what they are; a frozen one of another library
    is known by its two buffers.
    """
    found = {}
    for name, module in root_of(model).named_modules():
        mean, variance = (getattr(module, k, None) for k in ("running_mean", "running_var"))
        if not isinstance(mean, Tensor) or not isinstance(variance, Tensor):
            continue
        if isinstance(module, PER_INSTANCE):
            continue
        for buffer, tensor in (("running_mean", mean), ("running_var", variance)):
            if not bool(torch.isfinite(tensor).all()):
                raise WeightError(
                    f"{buffer} of the batch norm {name} holds NaN or inf",
                    fix="load a checkpoint whose statistics are finite",
                )
        deviation = (variance.detach().float() + EPSILON).sqrt()
        found[module] = Target(name, mean.detach().float(), deviation)
    if not found:
        raise CalibrationError(
            f"{type(model).__name__} has no batch norm with running statistics to distill inputs "
            "from",
            fix=f"{OWN_BATCHES}; of tokens: mpq_fx.synthetic.sampled or random_tokens",
        )
    if all(_is_new(target) for target in found.values()):
        log.warning("every batch norm has the statistics of a new model: was it trained?")
    return found


def _is_new(target: Target) -> bool:
    is_one = torch.allclose(target.deviation, torch.ones(()).to(target.deviation))
    return is_one and not bool(target.mean.any())


def _check_one_input(model: nn.Module) -> None:
    needed = [p.name for p in parameters_of_forward(model) if is_required(p)]
    if len(needed) > 1:
        raise ConfigError(
            f"{type(model).__name__}.forward needs {len(needed)} inputs ({', '.join(needed)}), and "
            "distilling makes one",
            fix="wrap the model in a module of one input that makes the others",
        )


def _input_target(
    mean: float | Sequence[float] | None,
    std: float | Sequence[float],
    channels: int,
    device: torch.device,
) -> Target | None:
    """What the input is normalized to, per channel; None where nothing is known of it."""
    if mean is None:
        return None
    values = [torch.tensor(v, dtype=torch.float32, device=device) for v in (mean, std)]
    for name, each in zip(("mean", "std"), values, strict=True):
        if each.dim() and each.shape != (channels,):
            raise ConfigError(
                f"{name} has {each.numel()} numbers for {channels} channels",
                fix=f"one number, or {channels}",
            )
    if not bool((values[1] > 0).all()):
        raise ConfigError(f"std={std} must be above 0", fix="std=1.0")
    whole = [each.expand(channels) for each in values]
    return Target("the input", whole[0], whole[1])


def _by_channel(noise: Tensor, wanted: Target | None) -> Tensor:
    """Unit noise with the statistics that the input should have."""
    if wanted is None:
        return noise
    sizes = (-1, *[1] * (noise.dim() - 2))
    return noise * wanted.deviation.view(sizes) + wanted.mean.view(sizes)


def _loss(
    run: Callable[..., Any],
    layers: Mapping[nn.Module, Target],
    wanted: Target | None,
    dtype: torch.dtype,
    x: Tensor,
) -> Tensor:
    """The whole sum of one call in `dtype`; CalibrationError where it cannot lead x anywhere."""
    with _reading(layers) as terms:
        run(x.to(dtype))
    if not terms:
        raise CalibrationError(
            "forward calls none of the batch norms: " + ", ".join(t.name for t in layers.values()),
            fix=OWN_BATCHES,
        )
    for target, term in terms:
        if not bool(torch.isfinite(term)):
            raise CalibrationError(
                f"distilling made NaN or inf at the batch norm {target.name}",
                fix="a smaller learning_rate, or mean and std that the input is normalized to",
            )
    loss = torch.stack([term for _, term in terms]).sum()
    if not loss.requires_grad:
        raise CalibrationError(
            "no gradient of the batch norms reaches the input",
            fix="forward must not call torch.no_grad() or detach()",
        )
    return loss if wanted is None else loss + distance(x, wanted)


@contextmanager
def _reading(layers: Mapping[nn.Module, Target]) -> Iterator[list[tuple[Target, Tensor]]]:
    """The terms of what each batch norm reads while this is entered, in order of calls."""
    terms: list[tuple[Target, Tensor]] = []

    def read(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        target, (x, *_) = layers[module], (*args, *kwargs.values())
        terms.append((target, distance(x, target)))

    hooks = [m.register_forward_pre_hook(read, with_kwargs=True) for m in layers]
    try:
        yield terms
    finally:
        for hook in hooks:
            hook.remove()


def distance(x: Tensor, target: Target) -> Tensor:
    """‖μ − mean‖² + ‖σ − deviation‖², per channel (the second dimension) of x."""
    rows = x.float().transpose(0, 1).flatten(1)
    variance = rows.var(1, correction=min(1, rows.shape[1] - 1))
    deviation = (variance + EPSILON).sqrt()
    return (rows.mean(1) - target.mean).square().sum() + (
        deviation - target.deviation
    ).square().sum()


def _descend(
    start: Tensor,
    loss_of: Callable[[Tensor], Tensor],
    steps: int,
    learning_rate: float,
    advance: Callable[[], None],
) -> tuple[Tensor, list[float]]:
    """The x of least loss that Adam comes by, and the losses of the first and of that one."""
    x = start.requires_grad_()
    optimizer = torch.optim.Adam([x], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=FACTOR, patience=PATIENCE, min_lr=min(FLOOR, learning_rate)
    )
    best, kept, first = float("inf"), x, float("inf")
    for step in range(steps + 1):
        loss = loss_of(x)
        value = float(loss.detach())
        first = value if step == 0 else first
        if value < best:
            best, kept = value, x.detach().clone()
        if step < steps:
            (x.grad,) = torch.autograd.grad(loss, x)
            optimizer.step()
            schedule.step(value)
            advance()
    return kept, [first, best]
