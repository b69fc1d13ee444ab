"""Modules that PyTorch computes by one op: their layers are sites, and the results the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import mpq_fx
from mpq_fx.fused_modules import PARTS
from mpq_fx.graph import ops
from mpq_fx.report import coverage
from tests.architectures import values
from tests.small import Net, batch, compiled_of
from tests.toy_backend import Toy

OFF_THE_END = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0], [0, 0, 1, 1, 1]]).bool()
AHEAD = torch.ones(5, 5).triu(1).bool()
TOKENS = values(3, 5, 8)
ADDED = torch.zeros(3, 1, 5, 5).masked_fill(OFF_THE_END[:, None, None], float("-inf"))
MASKS = {
    "none": {},
    "keys": {"mask": OFF_THE_END, "mask_type": 1},
    "floats of keys": {"mask": ADDED[:, 0, 0], "mask_type": 1},
    "causal": {"mask": AHEAD, "mask_type": 0},
    "merged": {"mask": (ADDED + ADDED.new_zeros(1, 2, 5, 5)), "mask_type": 2},
}
LAYERS = ["self_attn", "attention", "self_attn.out_proj", "linear1", "linear2"]


def shaken(module: nn.Module) -> nn.Module:
    """Biases begin as zeros and norms as ones, where a mistake would not be seen."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.eval()


def projections(net: nn.MultiheadAttention) -> tuple[torch.Tensor, ...]:
    return net.in_proj_weight, net.in_proj_bias, net.out_proj.weight, net.out_proj.bias


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("weights", [(False, False), (True, True), (True, False)], ids=str)
def test_attention_computes_what_the_fused_op_does(mask, weights):
    net = shaken(nn.MultiheadAttention(8, 2, batch_first=True))
    need, average = weights
    options = {**mask, "need_weights": need, "average_attn_weights": average}
    args = (TOKENS, TOKENS, TOKENS, 8, 2, *projections(net))
    with torch.inference_mode():
        fused = torch._native_multi_head_attention(*args, **options)
        parts = PARTS[torch._native_multi_head_attention](*args, **options)
    torch.testing.assert_close(parts[0], fused[0])
    if need:
        torch.testing.assert_close(parts[1], fused[1])
    else:
        assert parts[1] is fused[1] is None


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_an_encoder_layer_computes_what_the_fused_op_does(activation, norm_first, mask):
    net = shaken(
        nn.TransformerEncoderLayer(
            8, 2, 16, batch_first=True, activation=activation, norm_first=norm_first
        )
    )
    norms = [getattr(net, name) for name in ("norm1", "norm2", "linear1", "linear2")]
    pairs = [tensor for module in norms for tensor in (module.weight, module.bias)]
    dims = (8, 2, *projections(net.self_attn), activation == "gelu", norm_first, 1e-5)
    with torch.inference_mode():
        fused = torch._transformer_encoder_layer_fwd(TOKENS, *dims, *pairs, **mask)
        parts = PARTS[torch._transformer_encoder_layer_fwd](TOKENS, *dims, *pairs, **mask)
    torch.testing.assert_close(parts, fused)


def test_the_graph_of_an_encoder_layer_has_its_layers(isolated):
    toy = Toy(())
    with torch.inference_mode():
        toy.compile(shaken(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)))(TOKENS)
    line = ops(toy.graph)
    assert line.split().count("linear") == 4
    assert "scaled_dot_product_attention" in line
    assert "transformer_encoder" not in line


def test_every_layer_of_an_encoder_is_in_the_report(isolated):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = shaken(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    options = {"target": "reference", "tolerance": 0.05, "calibration_calls": 3}
    compiled = torch.compile(model, backend="mpq", options=options)
    with torch.inference_mode():
        for seed in range(4):
            x = TOKENS.roll(seed, 0) + seed
            y = compiled(x, src_key_padding_mask=OFF_THE_END)
        want = model(x, src_key_padding_mask=OFF_THE_END)
    rows = mpq_fx.explain(compiled).rows
    assert {row.site.name for row in rows} == {f"layers.{k}.{n}" for k in (0, 1) for n in LAYERS}
    assert all(row.choice != "float32" for row in rows)
    assert 0 < (y - want).norm() < 0.1 * want.norm()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell])
def test_a_recurrent_cell_computes_what_its_op_does(kind, bias):
    cell, h = shaken(kind(8, 6, bias=bias)), values(3, 6)
    state = (h, h.roll(1, 0)) if kind is nn.LSTMCell else h
    op = torch.lstm_cell if kind is nn.LSTMCell else torch.gru_cell
    with torch.inference_mode():
        x = TOKENS[:, 0]
        torch.testing.assert_close(PARTS[op](x, state, *cell.parameters()), cell(x, state))


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell])
def test_both_linears_of_a_recurrent_cell_are_in_the_report(isolated, kind):
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = shaken(kind(32, 32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.cell(x)
            return h if isinstance(h, torch.Tensor) else h[0]

    compiled = compiled_of(Recurrent())
    with torch.inference_mode():
        for seed in range(3):
            compiled(batch(seed))
    report = mpq_fx.explain(compiled)
    assert {row.site.name for row in report.rows} == {"cell", "cell.weight_hh"}
    assert all(row.site.op == "linear" and row.choice != "float32" for row in report.rows)
    sizes = [row.site.weight_numel * 4 for row in report.rows]
    assert sum(share.bytes_before for share in coverage(report) if share.sites) == sum(sizes)


def test_a_query_without_keys_attends_to_nothing(isolated):
    """As in the module's own Python; the fused op has NaN there."""
    net = shaken(nn.MultiheadAttention(8, 2, batch_first=True))
    mask = {"mask": torch.ones(3, 5).bool(), "mask_type": 1}
    args = (TOKENS, TOKENS, TOKENS, 8, 2, *projections(net))
    with torch.inference_mode():
        y, _ = PARTS[torch._native_multi_head_attention](*args, **mask, need_weights=False)
    torch.testing.assert_close(y, net.out_proj.bias.expand_as(y))


def test_masks_of_floats_are_added(isolated):
    """Whatever they hold, as the documentation of the modules says; the fused op has NaN there."""
    net = shaken(nn.MultiheadAttention(8, 2, batch_first=True))
    bias = values(5, 5)
    args = (TOKENS, TOKENS, TOKENS, 8, 2, *projections(net))
    with torch.inference_mode():
        y, _ = PARTS[torch._native_multi_head_attention](*args, mask=bias, mask_type=0)
        qkv = functional.linear(TOKENS, net.in_proj_weight, net.in_proj_bias).chunk(3, -1)
        q, k, v = (x.unflatten(-1, (2, 4)).transpose(1, 2) for x in qkv)
        heads = functional.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2)
        want = net.out_proj(heads)
    torch.testing.assert_close(y, want)


def test_calls_with_an_additive_mask_are_counted(isolated):
    """-inf is what a mask of floats is made of, as nn.Transformer makes it."""

    class Masked(Net):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return super().forward((x @ x.T + mask).softmax(-1) @ x)

    compiled = compiled_of(Masked())
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    with torch.inference_mode():
        for seed in range(3):
            compiled(batch(seed), mask)
    (entry,) = mpq_fx.explain(compiled).entries
    assert entry.plan is not None
    assert entry.plan.error is not None
    assert 0 < entry.plan.error < 0.2
