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
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from mpq_fx.errors import CalibrationError, ConfigError, UnsupportedError, first_line
from mpq_fx.facts import Table
from mpq_fx.passes.analyze.calibrate import PLANS, multiplied
from mpq_fx.passes.analyze.metric import (
    IsWanted,
    Key,
    LossMetric,
    OutputLoss,
    Record,
    Single,
    Task,
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
from mpq_fx.passes.analyze.replay import as_real, difference, is_measurable, output_error

SUBSTITUTE = 'sensitivity="interlayer_hessian", which needs no loss'


@dataclass(frozen=True)
class Expansion:
    """A loss around the outputs of one call, up to second order."""

    leaves: Mapping[int, Tensor]  # position -> an output that the loss depends on
    slopes: Mapping[int, Tensor]  # g of each, in the graph of autograd

    def responses(
        self, outputs: Sequence[Any], reference: Sequence[Any]
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """e and H e of outputs that are not those of the float model."""
        errors = {
            k: difference(outputs[k], reference[k]).to(leaf) for k, leaf in self.leaves.items()
        }
        bent = self.bend(errors)
        _refuse_infinite("curvature", bent)
        return errors, bent

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


@dataclass(frozen=True)
class Response:
    """What a single did to the loss beside raising it."""

    error: Tensor  # s e, a sketch where it is long
    bent: Tensor  # H e / s
    noise: float
    is_changed: bool
    is_felt: bool
    is_sketched: bool

    def row(self) -> Tensor:
        """As numbers: noise in all its bits, flags, then the two that are as long."""
        noise = torch.tensor([self.noise], dtype=torch.float64).view(torch.float32)
        flags = torch.tensor([self.is_changed, self.is_felt, self.is_sketched]).float()
        return torch.cat([noise, flags, self.error.cpu(), self.bent.cpu()])

    @classmethod
    def of(cls, row: Tensor) -> Response:
        """What `row` made numbers of."""
        noise = row[:2].clone().view(torch.float64).item()
        is_changed, is_felt, is_sketched = row[2:5].bool().tolist()
        error, bent = row[5:].chunk(2)
        return cls(error, bent, noise, is_changed, is_felt, is_sketched)


def _interlayer_loss(task: Task) -> tuple[Table, Table]:
    """Rises of the user's loss by singles and pairs; noise powers of the same singles."""
    if len(task.losses) < len(task.records):
        raise ConfigError(
            "sensitivity='interlayer_loss' needs a loss, and none was given",
            fix="mpq_fx.tune(model, batches, loss=f)",
        )
    # By call: one whose numbers are known already is not measured again.
    losses = {id(record): loss for record, loss in zip(task.records, task.losses, strict=False)}
    seen = Seen()

    def each(record: Record, is_wanted: IsWanted) -> Iterator[Single]:
        reference = task.replay.run(record, {})
        at = expand(losses[id(record)], reference)
        is_sloped = any(bool(g.any()) for g in at.slopes.values())
        scale = _balance_of(task, record, reference, at)
        for unit, choice, outputs in singles(task, record, is_wanted):
            errors, bent = at.responses(outputs, reference)
            e, b = _flat(errors), _flat(bent)
            response = Response(
                sketch(e * scale),
                sketch(b / scale),
                output_error(outputs, reference, task.excluded) ** 2,
                is_changed=bool(e.any()),
                is_felt=is_sloped or bool(b.any()),
                is_sketched=e.numel() > WIDTH,
            )
            yield Single(unit, choice, at.rise(errors, bent), response.row())

    keep, passes = partial(_cross, seen), task.suffixes
    table = averaged("interlayer_loss", task, each, forward_passes=passes, keep=keep)
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
    return multiplied(table, kappa, plans=len(plans), kappa_from=basis)


def balance(e: Tensor, bent: Tensor) -> Tensor:
    """√(|H e| / |e|) of each number, smoothed: ⟨s e, H e / s⟩ = ⟨e, H e⟩, for factors of one size.

    A sketch is off by the product of the norms, which is least where both spread alike: errors of
    logits are everywhere, what H leaves of them is where probabilities are.
    """
    if e.numel() <= WIDTH or not bool(bent.any()):
        return torch.ones_like(e)
    levels = [x.abs() + 1e-3 * x.square().mean().sqrt() for x in (bent, e)]
    return (levels[0] / (levels[1] + e.square().mean().sqrt())).sqrt()


def _balance_of(
    task: Task, record: Record, reference: Sequence[Any], at: Expansion
) -> Tensor | float:
    """The `balance` of the first single of all: the same whoever measures which of them."""
    units = [unit for unit in task.units if len(task.options[unit[0]]) > 1]
    if not units or sum(as_real(leaf).numel() for leaf in at.leaves.values()) <= WIDTH:
        return 1.0
    replay = replace(task.replay, caches=False)
    outputs = replay.run(record, dict.fromkeys(units[0], task.options[units[0][0]][1]))
    return balance(*map(_flat, at.responses(outputs, reference)))


def _cross(seen: Seen, given: Sequence[Single]) -> None:
    """½ (⟨e_i, H e_j⟩ + ⟨e_j, H e_i⟩) of one call, and how large chance makes it."""
    found = {s.key: Response.of(s.row) for s in given if s.row is not None}
    if not found:
        return
    for single, one in zip(given, found.values(), strict=True):
        seen.is_changed |= one.is_changed
        seen.is_felt |= one.is_felt
        for site in single.unit:
            known = seen.noise.setdefault((site, single.choice.name), [])
            known.append(one.noise / len(single.unit))
    errors = torch.stack([one.error for one in found.values()]).double()
    bent = torch.stack([one.bent for one in found.values()]).double()
    products = errors @ bent.T
    seen.crossed.append((products + products.T) / 2)
    noise = errors.norm(dim=1)[:, None] * bent.norm(dim=1)
    is_sketched = any(one.is_sketched for one in found.values())
    seen.chances.append((noise + noise.T) / 2 if is_sketched else torch.zeros_like(noise))
    seen.keys, seen.numbers = [*found], seen.numbers + errors.shape[1]


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
