"""One model lowered for a target, uncompiled, beside its reference."""

from __future__ import annotations

import torch
from torch import nn

from mpq_fx.capture import capture
from mpq_fx.facts import Choice
from mpq_fx.formats import format_named
from mpq_fx.graph import clone, mark_weights, run_passes
from mpq_fx.numerics import relative_rms
from mpq_fx.passes import CANONICALIZE
from mpq_fx.passes.analyze.observe import observe, static_scales
from mpq_fx.passes.analyze.replay import replayer
from mpq_fx.passes.analyze.sites import find_sites
from mpq_fx.passes.lower.constants import evaluate, fold_constants
from mpq_fx.passes.lower.onednn import ONEDNN
from mpq_fx.passes.lower.target import Target
from mpq_fx.passes.rewrite import rewrite


class Lowered:
    """One model lowered twice in the same choices: mpq:: ops and a target's, both run eagerly."""

    def __init__(
        self,
        model: nn.Module,
        x: torch.Tensor,
        wanted: Choice | dict[str, Choice],
        mode: str = "",
        target: Target = ONEDNN,
    ) -> None:
        self.model, self.found = model.eval(), []
        torch.manual_seed(0)
        with torch.no_grad():
            torch.compile(self.model, backend=self._backend)(x)
        gm, inputs = self.found
        self.parameters = {
            n.name: v
            for n, v in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True)
            if isinstance(v, nn.Parameter) or v is not x
        }
        self.inputs, self.sites = inputs, find_sites(gm, self.paths)
        replay = replayer(gm, self.sites, self.parameters)
        each = wanted.values() if isinstance(wanted, dict) else [wanted]
        formats = [format_named(c.activation) for c in each if c.scaling == "static"]
        with torch.no_grad():
            scales = static_scales(observe(replay, [inputs]), formats)
        choices = {
            site.name: choice
            for site in self.sites
            for name, choice in (wanted if isinstance(wanted, dict) else {"": wanted}).items()
            if choice in target.choices.get(site.op, ()) and site.name.endswith(name)
        }
        self.reference, _ = clone(gm)
        rewrite(self.reference, self.sites, choices, scales)
        self.lowered, _ = clone(self.reference)
        self.kernels = target.lower(self.lowered, mode).kernels
        with torch.no_grad():
            self.folded = fold_constants(self.lowered, self.parameters)

    def _backend(self, gm, inputs):
        captured = capture(gm, inputs)
        assert not captured.refusal
        mark_weights(captured.gm, captured.parameters)
        run_passes(captured.gm, CANONICALIZE)
        self.found, self.paths = (captured.gm, inputs), captured.parameters
        return gm.forward

    @property
    def arguments(self) -> list[torch.Tensor]:
        small = [getattr(self.folded.gm, name) for name in self.folded.passed]
        return [*[self.inputs[k] for k in self.folded.live], *small]

    def error(self, run=None) -> float:
        with torch.no_grad():
            want = self.reference(*self.inputs)[0]
            got = (run or self.folded.gm)(*self.arguments)[0]
        return relative_rms(got, want)

    def refresh(self) -> None:
        """Recompute every constant from the present weights, in place."""
        fresh = evaluate(self.lowered, self.folded.recipes, self.parameters)
        for name, value in fresh.items():
            getattr(self.folded.gm, name).copy_(value)
