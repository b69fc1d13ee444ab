"""min Σ error[u, fmt(u)]  s.t.  mean bits of a weight <= budget,  u: groups or features of layers

A unit is a group of neighboring columns of a linear layer's weight ("name[group k]"), or one of its
output features ("name[feature o]").  Error and bits are tables like those of whole sites, and the
allocator is the same.  An analysis: no kernel of mpq-fx reads a weight whose groups differ, so that
no plan makes use of it; `mixed_groups` and `mixed_features` give the numbers of such a weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mpq_fx.errors import CalibrationError, ConfigError, InfeasibleError
from mpq_fx.facts import Table
from mpq_fx.formats import TENSOR, Format
from mpq_fx.numerics import fake_quantize
from mpq_fx.passes.allocate import SOLVERS, Problem, Solution
from mpq_fx.passes.allocate.problem import within
from mpq_fx.passes.analyze.linear_layers import (
    Call,
    Loss,
    at_least_one,
    linear_layers,
    weight_gradients,
)
from mpq_fx.passes.analyze.salience import fisher_change, per_group

Tables = Mapping[str, Table]  # "error" and "bits"


def group_errors(name: str, w: Tensor, moment: Tensor, formats: Sequence[Format]) -> Tables:
    """error = ‖X (Q − W)ᵀ‖² / ‖X Wᵀ‖² of a layer, exactly: single terms and all pairs of groups

    `moment` M is XᵀX.  noise[k, b] = ⟨Δ_k M_kk, Δ_k⟩,  pair[k, b; l, c] = 2 ⟨Δ_k M_kl, Δ_l⟩.
    """
    size = group_size(formats)
    w, moment = w.detach().double().cpu(), moment.double().cpu()
    signal = float(((w @ moment) * w).sum())
    if not signal > 0.0:
        raise CalibrationError(f"the outputs of the layer have the power {signal}", at=name)
    deltas = {fmt.name: fake_quantize(w, fmt) - w for fmt in formats}
    units = _groups(name, w.shape[1], size)
    values, pairs = {}, {}
    for k, unit in enumerate(units):
        here = slice(k * size, (k + 1) * size)
        for b, delta in deltas.items():
            moved = delta[:, here] @ moment[here] / signal
            terms = {c: per_group(moved * other, size).tolist() for c, other in deltas.items()}
            values[unit, b] = terms[b][k]
            for c, found in terms.items():
                later = zip(units[k + 1 :], found[k + 1 :], strict=True)
                pairs.update({(unit, b, v, c): 2.0 * term for v, term in later})
    error = Table("output_error", "noise_power", values, pairs=pairs)
    return {"error": error, "bits": _group_bits(units, w.shape[1], formats)}


def group_losses(name: str, losses: Mapping[str, Tensor], formats: Sequence[Format]) -> Tables:
    """error[k, fmt] = Σ over group k of losses[fmt], [N, K]: |∂L/∂W| · |Δ| (GWQ), Δ² / U² (SpQR)"""
    size = group_size(formats)
    k = losses[formats[0].name].shape[1]
    units = _groups(name, k, size)
    values = {
        (unit, fmt.name): total
        for fmt in formats
        for unit, total in zip(units, per_group(losses[fmt.name], size).tolist(), strict=True)
    }
    return {"error": Table("salience", "loss", values), "bits": _group_bits(units, k, formats)}


def feature_errors(
    model: nn.Module,
    calls: Sequence[Call],
    loss: Loss,
    formats: Sequence[Format],
    layers: Sequence[str] = ("*",),
) -> Tables:
    """error[o, fmt] = Σ over calls of |t + t² / 2|,  t = ⟨∂ loss / ∂ w_o, q(w_o) − w_o⟩ (MixLLM)

    Of all layers together.  A call is one sample: in a batch, what samples cancel would be lost.
    """
    _check_rows(formats)
    chosen = linear_layers(model, layers)
    deltas = {
        (name, fmt.name): fake_quantize(layer.weight.detach(), fmt) - layer.weight.detach()
        for name, layer in chosen.items()
        for fmt in formats
    }
    sums = {key: torch.zeros(len(delta), dtype=torch.float64) for key, delta in deltas.items()}
    for call in at_least_one(calls):
        gradients = weight_gradients(model, call, loss, layers)
        for (name, fmt), delta in deltas.items():
            sums[name, fmt] += fisher_change((gradients[name] * delta.cpu()).sum(1))
    values = {
        (f"{name}[feature {o}]", fmt): score
        for (name, fmt), found in sums.items()
        for o, score in enumerate(found.tolist())
    }
    error = Table("fisher_change", "loss", values, provenance={"records": len(calls)})
    return {"error": error, "bits": _feature_bits(chosen, formats)}


def allocate(tables: Tables, bits: float, *, solver: str = "cp_sat") -> Solution:
    """The format of each unit with the least error; mean bits, scales included, within `bits`"""
    error, shares = tables["error"], tables["bits"].values
    options: dict[str, tuple[str, ...]] = {}
    for unit, option in error.values:
        options[unit] = (*options.get(unit, ()), option)
    least = sum(min(shares[unit, o] for o in offers) for unit, offers in options.items())
    if not within(least, bits):
        raise InfeasibleError(
            f"no formats have {bits:g} bits in the mean, scales included",
            fix=f"bits={least:.4f} or more",
        )
    return SOLVERS.named(solver)(
        Problem(
            options=options,
            error=error.values,
            pairs=error.pairs,
            resources={"bits": shares},
            budgets={"bits": bits},
            objective=("error",),
        )
    )


def formats_of(solution: Solution, name: str, formats: Sequence[Format]) -> tuple[Format, ...]:
    """The formats of the units of one layer, in order."""
    known = {fmt.name: fmt for fmt in formats}
    found = [known[o] for u, o in solution.assignment.items() if u.rpartition("[")[0] == name]
    if not found:
        raise ConfigError(f"there is no unit of {name!r} in the solution", at=name)
    return tuple(found)


def mixed_groups(w: Tensor, formats: Sequence[Format]) -> Tensor:
    """w with each group of columns rounded to its format"""
    size = group_size(formats)
    _check_count(formats, -(-w.shape[1] // size), "groups")
    rounded = {fmt: fake_quantize(w, fmt).split(size, 1) for fmt in set(formats)}
    return torch.cat([rounded[fmt][k] for k, fmt in enumerate(formats)], 1)


def mixed_features(w: Tensor, formats: Sequence[Format]) -> Tensor:
    """w with each row rounded to its format"""
    _check_count(formats, len(w), "output features")
    rounded = {fmt: fake_quantize(w, fmt) for fmt in set(formats)}
    return torch.stack([rounded[fmt][o] for o, fmt in enumerate(formats)])


def group_size(formats: Sequence[Format]) -> int:
    """The columns of a group: the block that all formats share"""
    sizes = {fmt.block for fmt in formats}
    if len(sizes) != 1 or min(sizes) <= 0:
        blocks = ", ".join(f"{fmt.name}: {fmt.block}" for fmt in formats)
        raise ConfigError(
            f"groups of one size need one block above 0, not ({blocks})",
            fix="formats that differ in their elements only",
        )
    return sizes.pop()


def _check_rows(formats: Sequence[Format]) -> None:
    for fmt in formats:
        if fmt.block == TENSOR:
            raise ConfigError(
                f"{fmt.name} has one scale for all output features",
                fix="formats with a scale for each row, or for groups of it",
            )


def _check_count(formats: Sequence[Format], count: int, what: str) -> None:
    if len(formats) != count:
        raise ConfigError(f"{len(formats)} formats for {count} {what}", fix=f"{count} formats")


def _groups(name: str, k: int, size: int) -> list[str]:
    return [f"{name}[group {index}]" for index in range(-(-k // size))]


def _group_bits(units: Sequence[str], k: int, formats: Sequence[Format]) -> Table:
    """Bits of a group's codes and scales, as its share of the mean over the layer's weights"""
    size = group_size(formats)
    values = {
        (unit, fmt.name): _row_bits(fmt, min(size, k - index * size)) / k
        for index, unit in enumerate(units)
        for fmt in formats
    }
    return Table("exact", "bits", values)


def _feature_bits(layers: Mapping[str, nn.Linear], formats: Sequence[Format]) -> Table:
    """Bits of a row's codes and scales, as its share of the mean over all layers' weights"""
    total = sum(layer.weight.numel() for layer in layers.values())
    values = {
        (f"{name}[feature {o}]", fmt.name): _row_bits(fmt, layer.in_features) / total
        for name, layer in layers.items()
        for fmt in formats
        for o in range(layer.out_features)
    }
    return Table("exact", "bits", values)


def _row_bits(fmt: Format, k: int) -> float:
    """Bits of k codes, however they would be packed, with their scales and a byte per zero point"""
    codes = float(k * fmt.element.bits)
    if fmt.progressive:
        codes = float(k * fmt.progressive.bits + fmt.progressive.groups(k) * 16)
    if fmt.scale is None:
        return codes
    return codes + fmt.groups(k) * (fmt.scale.itemsize * 8 + (0 if fmt.symmetric else 8))
