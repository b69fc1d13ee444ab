"""Kernels of packages: what they take over, and what they offer as a plan is made."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import mpq_fx
from mpq_fx.doctor import examine
from mpq_fx.facts import BFLOAT16, Site
from mpq_fx.passes import TARGETS, target_named
from mpq_fx.passes.lower.kernel import Kernel, Offer, with_kernels

KERNEL = """
    import torch
    from mpq_fx.graph import insert_call
    from mpq_fx.passes.lower.kernel import Kernel

    CALLS = []

    @torch.library.custom_op("tiny::linear", mutates_args=())
    def linear(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        CALLS.append(x.shape)
        return torch.nn.functional.linear(x, w, b)

    @linear.register_fake
    def _(x, w, b):
        return x.new_empty((*x.shape[:-1], w.shape[0]))

    def refuse(node):
        if node.args[1].meta["val"].shape[0] != 32:
            yield "only 32 outputs"

    def lower(gm, node):
        return insert_call(node, torch.ops.tiny.linear.default, node.args)

    tiny = Kernel("reference", torch.ops.aten.linear.default, refuse, lower)
"""


def test_a_kernel_takes_what_it_does_not_refuse(install, isolated):
    install("tiny_kernel", KERNEL, kernels="tiny = tiny_kernel:tiny")
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)).eval()
    options = {"target": "reference", "calibration_calls": 3, "formats": ["float32"]}
    compiled = torch.compile(model, backend="mpq", options=options)
    with torch.inference_mode():
        for _ in range(4):
            x = torch.randn(4, 16)
            assert torch.allclose(compiled(x), model(x))
    report = mpq_fx.explain(compiled)
    assert [row.site.name for row in report.rows if row.kernel == "tiny"] == ["0"]
    refused = {row.site.name: row.refusals.get("tiny") for row in report.rows}
    assert refused == {"0": None, "2": ("only 32 outputs",)}, "the ledger says why not the other"
    assert "tiny" in str(examine())
    calls = sys.modules["tiny_kernel"].CALLS
    assert calls, "the callee in the final graph runs"
    assert set(calls) == {(4, 16)}
    assert target_named("cpu") is TARGETS[0], "other targets stay as they are"


OFFER = """
    import time
    import torch
    from mpq_fx.facts import Choice
    from mpq_fx.formats import Format, Int
    from mpq_fx.graph import insert_call
    from mpq_fx.passes.lower.kernel import Kernel, Offer

    int6 = Format("int6", Int(6), scale=torch.float32)
    SIX = Choice("int6", "bfloat16")
    MEASURED = []

    @torch.library.custom_op("six::linear", mutates_args=())
    def linear(x: torch.Tensor, w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return x @ (w.float() * scale).t().to(x.dtype)

    @linear.register_fake
    def _(x, w, scale):
        return x.new_empty((*x.shape[:-1], w.shape[0]))

    def refuse_site(site, choice):
        if site.weight_shape[0] % 64:
            yield f"{site.weight_shape[0]} outputs are no multiple of 64"

    def measure(site, choice):
        MEASURED.append(site.name)
        return 1e-6

    def refuse(node):
        *_, x_fmt, w_fmt, dtype = node.args
        if (x_fmt, w_fmt) != ("bfloat16", "int6") or node.args[3].meta["val"].shape[0] % 64:
            yield f"{x_fmt} times {w_fmt} of a shape that is not for it"

    def lower(gm, node):
        x, _, _, w, scale, _, bias, *_, dtype = node.args
        y = insert_call(node, torch.ops.six.linear.default, (x, w, scale))
        y = insert_call(node, torch.ops.aten._to_copy.default, (y,), {"dtype": dtype})
        return y if bias is None else insert_call(node, torch.ops.aten.add.Tensor, (y, bias))

    def on(target):
        return Kernel(
            target,
            torch.ops.mpq.linear.default,
            refuse,
            lower,
            offer=Offer({"linear": (SIX,)}, refuse_site, measure),
        )

    six, six_triton, six_reference = on("cpu"), on("triton"), on("reference")
"""


def install_six(install):
    kernels = ("six", "six_triton", "six_reference")
    lines = "\n".join(f"{name} = six_kernels:{name}" for name in kernels)
    install("six_kernels", OFFER, formats="int6 = six_kernels:int6", kernels=lines)


@pytest.mark.parametrize("target", ["cpu", "triton", "reference"])
def test_a_kernel_offers_a_format_that_its_target_has_none_for(install, isolated, tmp_path, target):
    if target == "triton" and target_named("triton").unavailable():
        pytest.skip("neither a GPU nor the interpreter")
    install_six(install)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 96)).eval()
    options = {
        "target": target,
        "tolerance": 0.2,
        "formats": {"0": ["int6"], "2": ["int6"]},
        "objective": "size",
        "calibration_calls": 3,
        "cache_dir": str(tmp_path),
    }
    compiled = torch.compile(model, backend="mpq", options=options)
    with torch.inference_mode():
        for _ in range(4):
            x = torch.randn(8, 64)
            got, want = compiled(x), model(x)
    assert 1e-4 < float((got - want).norm() / want.norm()) < 0.2
    rows = {row.site.name: row for row in mpq_fx.explain(compiled).rows}
    assert rows["0"].choice == "int6*bfloat16"
    assert rows["0"].kernel.startswith("six")
    assert rows["2"].choice == "float32", "96 outputs"
    assert "no multiple of 64" in str(rows["2"].refusals["int6*bfloat16"])
    on_disk = "".join(path.read_text() for path in tmp_path.rglob("latency*"))
    assert "'float32') int6" not in on_disk, "milliseconds of a plug-in are measured anew"
    assert bool(sys.modules["six_kernels"].MEASURED) == (target == "cpu")
    assert "int6*bfloat16" in str(examine())


@pytest.mark.parametrize(
    ("own", "theirs", "ms"),
    [((), (), 1.0), (("no",), (), 1.0), ((), ("no",), 2.0)],
    ids=["both run it", "only the plug-in", "only the target"],
)
def test_what_either_a_target_or_a_plug_in_runs_is_not_refused(own, theirs, ms):
    choice, site = BFLOAT16, Site("a", "linear", "a")
    offer = Offer({"linear": (choice,)}, lambda *_: iter(theirs), lambda *_: 1.0)
    kernel = Kernel("toy", torch.ops.mpq.linear.default, lambda _: iter(()), None, offer=offer)
    toy = replace(
        TARGETS[0],
        name="toy",
        choices={"linear": (choice,)},
        refuse=lambda *_: iter(own),
        measure=lambda *_: 2.0,
    )
    found = with_kernels(toy, {"plug": kernel})
    assert not [*found.refuse(site, choice)]
    assert found.measure(site, choice) == ms
    assert found.choices == toy.choices, "each choice once"


def test_what_neither_runs_has_the_reasons_of_both():
    site, offer = Site("a", "linear", "a"), Offer({"linear": (BFLOAT16,)}, lambda *_: "b", None)
    kernel = Kernel("toy", torch.ops.mpq.linear.default, lambda _: iter(()), None, offer=offer)
    toy = replace(
        TARGETS[0], name="toy", choices={"linear": (BFLOAT16,)}, refuse=lambda *_: iter("a")
    )
    assert sorted(with_kernels(toy, {"plug": kernel}).refuse(site, BFLOAT16)) == ["a", "plug: b"]
