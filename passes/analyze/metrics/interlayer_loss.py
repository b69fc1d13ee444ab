"""noise[u, c] = ⟨g, e(u, c)⟩ + ½ ⟨e(u, c), H e(u, c)⟩,  pair[u, c; v, d] = ⟨e(u, c), H e(v, d)⟩,
g, H = gradient and Hessian of the user's loss by the outputs: the inter-layer augmented Hessian.

L(y + e) − L(y) ≈ ⟨g, e⟩ + ½ ⟨e, H e⟩, and the errors e of singles add up to first order, for
weights and activations alike.  e(u, c) = y(u alone in c) − y is exact; only the loss is
differentiated, and twice: one product with H for each single, none with the model.  Terms may be
negative: a loss may fall, and errors may cancel.  Scaled by κ to noise power.

Reconstruction, as interlayer_hessian is: of arXiv 2306.04879 only the abstract is public.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from mpq_fx.errors import CalibrationError, ConfigError, UnsupportedError, first_line
from mpq_fx.facts import Choice, Table
from mpq_fx.passes.analyze.metric import (
    IsWanted,
    Key,
    LossMetric,
    OutputLoss,
    Record,
    Task,
    Unit,
    averaged,
    filled,
    singles,
)
from mpq_fx.passes.analyze.metrics.interlayer_hessian import (
    WIDTH,
    chance,
    pairs_above,
    sketch,
)
from mpq_fx.passes.analyze.ranking import draw, measured, power
from mpq_fx.passes.analyze.replay import as_real, is_measurable, output_error

PLANS = 4  # that scale the table
SUBSTITUTE = 'sensitivity="interlayer_hessian", which needs no loss'


@dataclass(frozen=True)
class Expansion:
    """A loss around the outputs of one call, up to second order."""

    leaves: Mapping[int, Tensor]  # position -> an output that the loss depends on
    slopes: Mapping[int, Tensor]  # g of each, in the graph of autograd

    def rise(self, errors: Mapping[int, Tensor], bent: Mapping[int, Tensor]) -> float:
        """⟨g, e⟩ + ½ ⟨e, H e⟩ in float64"""
        slope = sum(_inner(g, errors[k]) for k, g in self.slopes.items())
        return slope + sum(_inner(errors[k], b) for k, b in bent.items()) / 2

    def bend(self, errors: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """H e; zeros where the loss is linear in an output, which is what autograd says of a user's
        own function marked `once_differentiable`, too.
        """
        curved = [k for k, g in self.slopes.items() if g.requires_grad]
        nothing = {k: torch.zeros_like(leaf) for k, leaf in self.leaves.items()}
        if not curved:
            return nothing
        try:
            found = torch.autograd.grad(
                [self.slopes[k] for k in curved],
                [*self.leaves.values()],
                [errors[k] for k in curved],
                retain_graph=True,
                allow_unused=True,
            )
        except (RuntimeError, NotImplementedError) as error:  # the message is PyTorch's own
            raise UnsupportedError(
                f"the loss cannot be differentiated twice: {first_line(error)}",
                fix=f"a loss of twice differentiable operations, or {SUBSTITUTE}",
            ) from error
        bent = zip(self.leaves, found, strict=True)
        return nothing | {k: b.detach() for k, b in bent if b is not None}


@dataclass
class Seen:
    """What a loss showed so far: the errors of singles with their products, and if any counted."""

    crossed: list[Tensor] = field(default_factory=list)  # [singles, singles] of each call
    chances: list[Tensor] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)
    noise: dict[Key, list[float]] = field(default_factory=dict)
    numbers: int = 0
    is_changed: bool = False  # did a single change what the loss sees?
    is_felt: bool = False  # did the loss have a slope or a curvature there?


def _interlayer_loss(task: Task) -> tuple[Table, Table]:
    """Rises of the user's loss by singles and pairs; noise powers of the same singles."""
    if len(task.losses) < len(task.records):
        raise ConfigError(
            "sensitivity='interlayer_loss' needs a loss, and none was given",
            fix="mpq_fx.tune(model, batches, loss=f)",
        )
    losses, seen = iter(task.losses), Seen()

    def each(record: Record, is_wanted: IsWanted) -> Iterator[tuple[Unit, Choice, float]]:
        reference = task.replay.run(record, {})
        at = expand(next(losses), reference)
        is_sloped = any(bool(g.any()) for g in at.slopes.values())
        rows = dict[Key, tuple[Tensor, Tensor]]()
        scale: Tensor | None = None
        for unit, choice, outputs in singles(task, record, is_wanted):
            errors = {k: (outputs[k] - reference[k]).to(leaf) for k, leaf in at.leaves.items()}
            bent = at.bend(errors)
            _refuse_infinite("curvature", bent)
            e, b = _flat(errors), _flat(bent)
            seen.is_changed |= bool(e.any())
            seen.is_felt |= is_sloped or bool(b.any())
            scale = balance(e, b) if scale is None else scale
            rows[unit[0], choice.name] = sketch(e * scale), sketch(b / scale)
            noise = output_error(outputs, reference, task.excluded) ** 2
            for site in unit:
                seen.noise.setdefault((site, choice.name), []).append(noise / len(unit))
            yield unit, choice, at.rise(errors, bent)
        if rows:
            _cross(seen, rows, sum(leaf.numel() for leaf in at.leaves.values()))

    table = averaged("interlayer_loss", task, each, forward_passes=task.suffixes)
    _refuse_flat(seen)
    means = {key: fmean(powers) for key, powers in seen.noise.items()}
    noise = replace(table, metric="measured_singles", values=filled(task, means), spread={})
    return scaled(task, replace(table, pairs=_pairs(seen))), noise


interlayer_loss = LossMetric(_interlayer_loss)


def _refuse_flat(seen: Seen) -> None:
    if seen.is_changed and not seen.is_felt:
        raise CalibrationError(
            "the loss is flat: at the float outputs of every call its gradient and its curvature "
            "are zero, so it cannot tell one choice from another",
            fix=f"a loss that is not met already (a hinge, a clamp), or {SUBSTITUTE}",
        )


def expand(loss: OutputLoss, outputs: Sequence[Any]) -> Expansion:
    """Differentiate a loss once by every floating output, so that it can be done again."""
    with torch.enable_grad():
        given = [y.detach().clone().requires_grad_() if is_measurable(y) else y for y in outputs]
        value = loss(given)
        leaves = {k: y for k, y in enumerate(given) if is_measurable(y)}
        if not value.requires_grad:
            raise _independent()
        found = torch.autograd.grad(value, [*leaves.values()], create_graph=True, allow_unused=True)
    slopes = {k: g for k, g in zip(leaves, found, strict=True) if g is not None}
    if not slopes:
        raise _independent()
    _refuse_infinite("gradient", slopes)
    return Expansion({k: leaves[k] for k in slopes}, slopes)


def scaled(task: Task, table: Table) -> Table:
    """κ · table,  κ = Σ measured noise / Σ predicted rise  over the random plans that should hurt.

    Where no plan is predicted to hurt, magnitudes of rises stand for them; a table of zeros stays
    as it is.  A sum of ratios would hang on plans whose terms happen to cancel.
    """
    plans = [draw(task, seed) for seed in range(PLANS)]
    noise = [e**2 for e in measured(replace(task, records=task.records[:1]), plans)]
    rises = [power(table, plan) for plan in plans]
    both = [(n, r) for n, r in zip(noise, rises, strict=True) if r > 0.0]
    basis = "plans that raise the loss" if both else "magnitudes"
    both = both or [(n, abs(r)) for n, r in zip(noise, rises, strict=True)]
    whole = math.fsum(r for _, r in both)
    kappa = math.fsum(n for n, _ in both) / whole if whole > 0.0 else 1.0
    passes = table.provenance["forward_passes"] + len(plans) + 1
    return replace(
        table,
        values={key: kappa * value for key, value in table.values.items()},
        spread={key: kappa * value for key, value in table.spread.items()},
        pairs={key: kappa * value for key, value in table.pairs.items()},
        provenance={
            **table.provenance,
            "forward_passes": passes,
            "kappa": kappa,
            "kappa_from": basis,
        },
    )


def balance(e: Tensor, bent: Tensor) -> Tensor:
    """√(|H e| / |e|) of each number, smoothed: ⟨s e, H e / s⟩ = ⟨e, H e⟩, for factors of one size.

    A sketch is off by the product of the norms, which is least where both spread alike: errors of
    logits are everywhere, what H leaves of them is where probabilities are.
    """
    if e.numel() <= WIDTH or not bool(bent.any()):
        return torch.ones_like(e)
    levels = [x.abs() + 1e-3 * x.square().mean().sqrt() for x in (bent, e)]
    return (levels[0] / (levels[1] + e.square().mean().sqrt())).sqrt()


def _cross(seen: Seen, rows: Mapping[Key, tuple[Tensor, Tensor]], numbers: int) -> None:
    """½ (⟨e_i, H e_j⟩ + ⟨e_j, H e_i⟩) of one call, and how large chance makes it."""
    errors, bent = (torch.stack([pair[k] for pair in rows.values()]).double() for k in (0, 1))
    products = errors @ bent.T
    seen.crossed.append((products + products.T) / 2)
    noise = errors.norm(dim=1)[:, None] * bent.norm(dim=1)
    is_sketched = numbers > WIDTH
    seen.chances.append((noise + noise.T) / 2 if is_sketched else torch.zeros_like(noise))
    seen.keys, seen.numbers = [*rows], seen.numbers + numbers


def _pairs(seen: Seen) -> dict[tuple[str, str, str, str], float]:
    if not seen.crossed:
        return {}
    terms = torch.stack(seen.crossed).mean(0)
    norms = terms.diagonal().abs().sqrt()
    sketched = chance(torch.stack(seen.chances).mean(0), WIDTH)
    least = torch.maximum(chance(norms[:, None] * norms, seen.numbers), sketched)
    return pairs_above(least, terms, seen.keys)


def _inner(a: Tensor, b: Tensor) -> float:
    """⟨a, b⟩ of real numbers; a complex one counts as two."""
    return float((as_real(a.detach()).double() * as_real(b).double()).sum())


def _flat(tensors: Mapping[int, Tensor]) -> Tensor:
    return torch.cat([as_real(x).float().reshape(-1) for x in tensors.values()])


def _independent() -> ConfigError:
    return ConfigError(
        "the loss does not depend on the outputs of the model, or not differentiably: .item(), "
        ".detach(), argmax, rounding and torch.no_grad() cut the way back",
        fix="return a differentiable loss of the output; what is not one goes to metric=",
    )


def _refuse_infinite(what: str, tensors: Mapping[int, Tensor]) -> None:
    for k, x in tensors.items():
        if not bool(torch.isfinite(as_real(x.detach())).all()):
            raise CalibrationError(
                f"the {what} of the loss by output {k} is not finite at the float outputs: "
                f"a root or a norm at zero, a logarithm of zero, or an overflow",
                fix="a smooth loss: add a small number under the root, use log_softmax, or square",
            )
