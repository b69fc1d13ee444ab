"""The target `triton`: its kernels are in the graph, and compute what the reference does."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

import mpq_fx
from mpq_fx.batch import call
from mpq_fx.build import beside
from mpq_fx.errors import UnsupportedError
from mpq_fx.facts import Choice
from mpq_fx.graph import ops
from mpq_fx.numerics import relative_rms
from mpq_fx.passes.lower import triton
from mpq_fx.registry import bindings_of
from tests import architectures
from tests.lowered import Lowered

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STATIC = Choice("int8", "uint8_tensor", "static")
SIGNED = Choice("int8", "int8_tensor", "static")
DYNAMIC = Choice("int8", "int8", "dynamic")
PACKED = Choice("int4", "int4_tensor", "static")
SHIFTED = Choice("int8", "int8_asym", "dynamic")
PLAIN = {"linear": "mpq_triton.int8_linear", "quantize": "mpq_triton.quantize"}


def lowered(model: nn.Module, x: torch.Tensor, wanted) -> Lowered:
    return Lowered(model.to(DEVICE), x.to(DEVICE), wanted, target=triton.on())


def callees(found: Lowered) -> str:
    """The final graph, without what takes a tuple apart."""
    names = ops(found.folded.gm).split()
    return " ".join(n.removeprefix("mpq_triton.") for n in names if n != "getitem")


class Gated(nn.Module):
    def __init__(self, norm: type[nn.Module] = nn.RMSNorm) -> None:
        super().__init__()
        self.norm, self.gate, self.up = norm(24), nn.Linear(24, 40), nn.Linear(24, 40)
        self.down = nn.Linear(40, 24)

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


class Block(nn.Module):
    """A residual around two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(24, 48), nn.Linear(48, 24), nn.LayerNorm(24)

    def forward(self, x):
        return self.norm(self.second(torch.relu(self.first(x))) + x)


def chain(activation: nn.Module) -> nn.Module:
    layers = nn.Linear(24, 40), activation, nn.Linear(40, 33), nn.Linear(33, 5)
    return nn.Sequential(*layers).eval()


CHAINS = [
    (nn.ReLU(), STATIC, 1e-6),
    (nn.ReLU(), SIGNED, 1e-6),
    (nn.SiLU(), STATIC, 1e-2),  # a code of an activation may move by one step
    (nn.GELU(), SIGNED, 1e-2),
    (nn.GELU(approximate="tanh"), STATIC, 1e-2),
]


@pytest.mark.parametrize(("activation", "choice", "limit"), CHAINS, ids=str)
def test_static_codes_pass_from_kernel_to_kernel(isolated, activation, choice, limit):
    found = lowered(chain(activation), torch.randn(7, 24), choice)
    assert callees(found) == "quantize int8_linear int8_linear int8_linear"
    assert set(found.kernels.values()) == {PLAIN["linear"]}
    assert found.error() <= limit


def test_codes_two_in_a_byte_are_written_by_a_quantization_of_their_own(isolated):
    """A linear stores a code in each byte, and none of another width."""
    choices = {**triton.CHOICES, "linear": (*triton.CHOICES["linear"], PACKED)}
    target = replace(triton.on(), choices=choices)
    x = torch.randn(6, 24, device=DEVICE)
    found = Lowered(chain(nn.ReLU()).to(DEVICE), x, PACKED, target=target)
    assert callees(found) == "quantize int4_linear " * 2 + "quantize int4_linear"
    assert found.error() <= 1e-6


@pytest.mark.parametrize("choice", [DYNAMIC, SHIFTED], ids=str)
def test_a_dynamic_scale_is_found_by_one_kernel_in_front(isolated, choice):
    found = lowered(chain(nn.ReLU()), torch.randn(2, 7, 24), choice)
    assert callees(found) == "quantize_dynamic int8_linear " * 2 + "quantize_dynamic int8_linear"
    assert found.error() <= 1e-6


@pytest.mark.parametrize(("choice", "kind"), [(DYNAMIC, "_dynamic"), (STATIC, "")], ids=str)
@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm], ids=lambda n: n.__name__)
def test_a_norm_and_a_product_are_computed_in_front_of_the_codes(isolated, choice, kind, norm):
    found = lowered(Gated(norm), torch.randn(3, 5, 24), choice)
    want = f"norm_quantize{kind} int8_linear slice slice activation_quantize{kind} int8_linear"
    assert callees(found) == want, "gate and up are one matmul; the residual is in the last one"
    assert found.error() <= 1e-2


def test_a_norm_that_others_read_stays_apart(isolated):
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(24), nn.Linear(24, 24)

        def forward(self, x):
            y = self.norm(x)
            return y + self.linear(y)

    found = lowered(Shared(), torch.randn(5, 24), DYNAMIC)
    assert callees(found) == "layer_norm quantize_dynamic int8_linear"
    assert found.error() <= 1e-6


@pytest.mark.parametrize("choice", [DYNAMIC, STATIC], ids=str)
def test_a_residual_is_added_in_the_kernel(isolated, choice):
    found = lowered(Block(), torch.randn(5, 24), choice)
    assert callees(found).endswith("int8_linear layer_norm")
    assert " add" not in callees(found)
    assert found.error() <= 1e-6


class Broadcast(nn.Module):
    """Sums and products of other shapes than a residual and a norm's weight have."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.row = nn.Linear(24, 24), nn.Parameter(torch.randn(5, 24))

    def forward(self, x):
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.linear(self.row * y) + self.row


def test_what_has_another_shape_is_neither_a_residual_nor_the_weight_of_a_norm(isolated):
    found = lowered(Broadcast(), torch.randn(3, 5, 24), DYNAMIC)
    assert callees(found).endswith("mul mul quantize_dynamic int8_linear add")
    assert found.error() <= 1e-6


COLUMNS = [0.25 * (k % 5) for k in range(24)]
DEQUANTIZED = {
    "a scale for each column": lambda q: (q.float() - torch.tensor(3.0)) * torch.tensor(COLUMNS),
    "a zero for each column": lambda q: (q.float() - torch.tensor(COLUMNS)) * torch.tensor(0.5),
    "codes of one row": lambda q: (q[:1].float() - torch.tensor(3.0)) * torch.tensor([[0.5]] * 5),
    "a factor": lambda q: torch.sub(q.float(), torch.tensor(3.0), alpha=2) * torch.tensor(0.5),
}


@pytest.mark.parametrize("dequantize", DEQUANTIZED.values(), ids=DEQUANTIZED)
def test_what_a_model_dequantizes_itself_is_added_as_it_says(isolated, dequantize):
    """Residual codes of a plan have one scale, one zero point and the shape of the sum."""

    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(24, 24)

        def forward(self, x):
            return self.linear(x) + dequantize((x * 50).to(torch.int8))

    assert lowered(Added(), torch.randn(5, 24), DYNAMIC).error() <= 1e-6


def test_scales_go_to_the_device_of_the_weights():
    scale, zero = torch.tensor(0.5), torch.tensor(3, dtype=torch.int32)
    weights = {"w": torch.empty(2, 2, device="meta")}
    ((there, also),) = beside({("site", "uint8_tensor"): (scale, zero)}, weights).values()
    assert (there.device.type, also.device.type) == ("meta", "meta")


def test_weights_are_packed_once_and_refreshed_in_place(isolated):
    model = chain(nn.ReLU())
    found = lowered(model, torch.randn(7, 24), STATIC)
    before = [b.data_ptr() for b in found.folded.gm.buffers()]
    with torch.no_grad():
        model[0].weight.mul_(-0.5)
        model[2].bias.add_(1.0)
    stale = found.error()
    found.refresh()
    assert found.error() <= 1e-6 < stale
    assert [b.data_ptr() for b in found.folded.gm.buffers()] == before


ONE_LAYER = {**architectures.TEXT, "num_hidden_layers": 1}


def bert():
    from transformers import BertConfig, BertModel

    # The result of a GELU may move a code over a tie; of a ReLU it is exact.
    return architectures.ready(BertModel(BertConfig(**ONE_LAYER, hidden_act="relu")))


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**ONE_LAYER, num_key_value_heads=2, use_cache=False)
    return architectures.ready(LlamaForCausalLM(config))


STATIC_NAME, DYNAMIC_NAME = "int8*uint8_tensor/static", "int8/dynamic"
NETS = {
    bert: (
        {"*": ["bfloat16"], "*dense*": [STATIC_NAME], "*self.[qkv]*": [DYNAMIC_NAME]},
        {"mpq_triton.quantize", "mpq_triton.quantize_dynamic"},
        ("cpu",),
    ),
    llama: (
        {"*": ["bfloat16"], "*_proj": [DYNAMIC_NAME], "*down_proj": [STATIC_NAME]},
        {"mpq_triton.norm_quantize_dynamic", "mpq_triton.activation_quantize"},
        (),
    ),
}
CLOSE = 1e-5


@pytest.mark.parametrize("build", NETS, ids=lambda build: build.__name__)
def test_one_plan_runs_on_every_target_and_gives_the_same(isolated, build, tmp_path):
    rules, fused, others = NETS[build]
    net, batches = build().to(DEVICE), [tokens(2, 8) for _ in range(4)]
    wishes = {"formats": rules, "objective": "size", "tolerance": 0.5, "sensitivity": "measured"}
    config = mpq_fx.Config(target="triton", **wishes)
    plan = mpq_fx.tune(net, batches, config=config, progress=False)
    assert {STATIC_NAME, DYNAMIC_NAME, "bfloat16"} <= {c.name for c in plan.choices.values()}
    plan.save(tmp_path / "plan.json")

    def on(target, *inputs):
        compiled = mpq_fx.apply(
            copy.deepcopy(net), tmp_path / "plan.json", config=config_of(target)
        )
        with torch.inference_mode():
            return compiled, [call(compiled, x)[0] for x in inputs]

    inputs = batches[-1], tokens(3, 5)  # the second compiles a graph of symbolic sizes
    _, want = on("reference", *inputs)
    compiled, found = on("triton", *inputs)
    calls = {name for _, b in bindings_of(compiled) for name in ops(b.installed.constants).split()}
    assert calls >= {"mpq_triton.int8_linear", *fused}
    assert not any(name.startswith("mpq.") for name in calls)
    rows = [row for row in mpq_fx.explain(compiled).rows if row.choice.startswith("int8")]
    assert {row.kernel for row in rows} == {"mpq_triton.int8_linear"}
    for x, y, reference in zip(inputs, found, want, strict=True):
        assert relative_rms(y, reference) <= CLOSE
        assert relative_rms(y, call(net, x)[0]) > 10 * CLOSE, "it is quantized"
    for target in others if DEVICE == "cpu" else ():
        assert relative_rms(on(target, inputs[0])[1][0], want[0]) <= CLOSE


def tokens(*shape):
    return torch.randint(0, architectures.VOCABULARY, shape, device=DEVICE)


def config_of(target: str) -> mpq_fx.Config:
    return mpq_fx.Config(target=target)


def test_codes_that_no_kernel_takes_are_an_error_and_not_slow_code(isolated):
    target = replace(triton.on(), choices={"linear": (Choice("int8_asym", "int8", "dynamic"),)})
    with pytest.raises(UnsupportedError, match=r"no kernel of triton runs mpq\.linear") as found:
        Lowered(
            chain(nn.ReLU()).to(DEVICE),
            torch.randn(3, 24, device=DEVICE),
            Choice("int8_asym", "int8", "dynamic"),
            target=target,
        )
    assert "weights are int8 with a scale per row" in str(found.value)


class Packed(nn.Module):
    """What is left of a linear after its weight was folded into constants."""

    def __init__(self, w: torch.Tensor) -> None:
        super().__init__()
        codes, scale, zero = torch.ops.mpq.quantize_weight(w, "int8")
        found = torch.ops.mpq_triton.int8_linear_pack(codes, scale, zero, "int8")
        for k, tensor in enumerate(found):
            self.register_buffer(f"packed_{k}", tensor)

    def forward(self, x, scale):
        packed = [self.packed_0, self.packed_1, self.packed_2]
        after = (None, None, None, None, None, None, "int8", "int8", packed[0].shape[0])
        y = torch.ops.mpq_triton.int8_linear(
            x, scale, None, packed, *after, "relu", torch.float32, ""
        )
        return torch.sin(y) + 1


def test_inductor_compiles_around_a_kernel_and_sees_refreshed_constants(isolated):
    net = Packed(torch.randn(8, 40)).to(DEVICE)
    codes, scale, _ = torch.ops.mpq.quantize_dynamic(torch.randn(5, 40, device=DEVICE), "int8")
    gm = torch.fx.symbolic_trace(net)
    run = triton.compile_inductor(gm, [codes, scale], "").run
    torch.testing.assert_close(run(codes, scale), net(codes, scale))
    before = net(codes, scale)
    other = Packed(torch.randn(8, 40)).to(DEVICE)
    for old, fresh in zip(gm.buffers(), other.buffers(), strict=True):
        old.copy_(fresh)
    assert not torch.allclose(run(codes, scale), before)
    torch.testing.assert_close(run(codes, scale), other(codes, scale))
