"""bench/gpu_peers.py: equal layers for all, a reason for what cannot run, errors beside times."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from mpq_fx.passes.lower import triton
from mpq_fx.passes.lower.triton_device import DEVICES

BENCH = Path(__file__).parents[1] / "bench"
AT = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(bool(triton.unavailable()), reason=triton.unavailable())
# What a format costs on normal numbers: half of it, and twice it.
COSTS = {
    "int4*bfloat16": (0.05, 0.2),
    "int8*bfloat16": (0.003, 0.012),
    "int8/dynamic": (0.005, 0.02),
    "fp8_e4m3/dynamic": (0.018, 0.075),
}
ON_CPU = ("torchao int8*bfloat16", "torchao int8/dynamic")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module
    for path in BENCH.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture
def peers(bench):
    return bench("gpu_peers")


@pytest.fixture
def gpu(bench, monkeypatch):
    module = bench("gpu")
    monkeypatch.setattr(module, "ROUNDS", 1)
    return module


@pytest.fixture
def absent(monkeypatch):
    """Neither package can be imported, installed or not."""
    for name in ("torchao", "gemlite"):
        for loaded in [each for each in sys.modules if each.split(".")[0] == name]:
            monkeypatch.delitem(sys.modules, loaded)
        monkeypatch.setitem(sys.modules, name, None)


def test_an_error_is_the_distance_from_the_product_in_float64(peers):
    given = peers.drawn(48, 40, 100, AT)
    x, w, bias = (t.double() for t in (given.x, given.w, given.bias))
    right = (x[:, None] * w[None]).sum(-1) + bias
    assert given.error(right) < 1e-14
    assert given.error(1.01 * right) == pytest.approx(0.01)
    wrong = right.clone()
    wrong[-1, -1] += 1.0
    assert given.error(wrong) == pytest.approx(float(1 / right[given.checked].norm()))
    assert 2.0**-11 < given.error(right.bfloat16()) < 2.0**-8
    again = peers.drawn(48, 40, 100, AT)
    assert torch.equal(given.x, again.x)
    assert torch.equal(given.w, again.w)


@pytest.mark.usefixtures("absent")
def test_a_package_that_is_not_installed_is_left_out_by_name(peers, capsys):
    given = peers.drawn(32, 128, 4, AT)
    kept, left_out = peers.running(peers.baselines(given, peers.PACKAGES), given)
    assert {"torch bfloat16", "torch._int_mm"} <= kept.keys()
    said = capsys.readouterr().err
    for name in peers.PEERS:
        assert left_out[name] == f"{name.split()[0].removesuffix('-mslk')} is not installed"
        assert f"{name} left out: {left_out[name]}\n" in said
    assert not left_out.keys() & kept.keys()


def test_a_reason_is_one_line_that_says_something(peers):
    assert peers.reason(RuntimeError("\n no such kernel\n  at x")) == "RuntimeError: no such kernel"
    assert peers.reason(ValueError("backend raised:\nOSError: full")) == (
        "ValueError: backend raised: OSError: full"
    )
    assert peers.reason(AssertionError()) == "AssertionError"


def test_only_the_packages_that_are_asked_for_are_tried(peers):
    given = peers.drawn(32, 128, 4, AT)
    named = {name.split()[0] for name in peers.baselines(given, ["torchao"])}
    assert {"torchao", "torchao-mslk"} <= named
    assert "gemlite" not in named


def test_a_baseline_that_cannot_run_is_left_out_with_the_first_line_of_its_reason(peers, capsys):
    given = peers.drawn(32, 32, 4, AT)

    def failing():
        raise RuntimeError("needs a newer GPU\nand more")

    def giving(y):
        return lambda: lambda: y

    right = torch.nn.functional.linear(given.x, given.w, given.bias)
    kept, left_out = peers.running(
        {
            "fine": giving(right),
            "failing": failing,
            "float32": giving(right.float()),
            "nan": giving(right / 0 * 0),
        },
        given,
    )
    assert [*kept] == ["fine"]
    assert kept["fine"].float_error < 2.0**-8
    assert left_out["failing"] == "RuntimeError: needs a newer GPU"
    assert "gives torch.float32 of (4, 32), not bfloat16 of (4, 32)" in left_out["float32"]
    assert left_out["nan"] == "RuntimeError: its result is not finite"
    assert "failing left out: RuntimeError: needs a newer GPU\n" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")  # the packages' own
@pytest.mark.parametrize("package", ["torchao", "gemlite"])
@pytest.mark.usefixtures("isolated")
def test_layers_of_a_package_cost_what_their_formats_cost(peers, package):
    import torch._inductor.config as inductor

    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    before = inductor.get_config_copy()
    given = peers.drawn(256, 1024, 32, AT)
    makers = peers.baselines(given, [package])
    mine = {name: make for name, make in makers.items() if name in peers.PEERS}
    kept, left_out = peers.running(mine, given)
    assert kept.keys() | left_out.keys() == mine.keys()
    expected = mine.keys() if AT.type == "cuda" else mine.keys() & ON_CPU
    needs_more = {name for name, reason in left_out.items() if "mslk" in reason}
    assert kept.keys() >= expected - needs_more, left_out
    for name, each in kept.items():
        least, most = COSTS[name.split()[1]]
        assert least < each.float_error < most, name
    assert inductor.get_config_copy() == before


@pytest.mark.filterwarnings("ignore")
def test_a_layer_that_torchao_leaves_as_it_is_is_no_result(peers):
    if find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    given = peers.drawn(48, 40, 4, AT)  # 40 is no multiple of the group
    name = "torchao int4*bfloat16"
    _, left_out = peers.running({name: peers.baselines(given, ["torchao"])[name]}, given)
    assert left_out[name] == "RuntimeError: torchao leaves a weight of (48, 40) as it is"


@pytest.mark.usefixtures("absent")
def test_beside_dynamic_peers_the_kernels_start_from_floats_too(gpu):
    layer = gpu.Layer("tiny", "out", 48, 256)
    timed, left_out = gpu.compare(layer, 5, DEVICES["h100"], AT, lambda call: float(call() is None))
    found = {each.variant: each for each in timed}
    for name in ("int8/dynamic", "fp8_e4m3/dynamic"):
        codes, floats = found[name], found[f"quantize + {name}"]
        assert floats.kernel == f"quantize_dynamic, {codes.kernel}"
        assert floats.float_error == pytest.approx(codes.float_error, rel=1e-3)
        assert floats.bytes == codes.bytes + 5 * 256
    for name, (least, most) in COSTS.items():
        assert least < found[name].float_error < most, name
    assert found["torch._int_mm"].float_error is None
    assert {(each.model, each.layer, each.rows) for each in left_out} == {("tiny", "out", 5)}
    reasons = {each.variant: each.reason for each in left_out}
    assert reasons["gemlite int4*bfloat16"] == "gemlite is not installed"


def test_a_call_from_floats_reads_the_floats(gpu):
    floats = gpu.drawn(48, 256, 5, AT)
    found = gpu.ours(gpu.Layer("tiny", "out", 48, 256), floats, DEVICES["h100"])
    run, _ = found["quantize + int8/dynamic"]
    before = run()
    floats.x.mul_(-2)  # other codes and other scales; the bias stays
    before, after = ((y - floats.bias).float() for y in (before, run()))
    assert (after + 2 * before).norm() < 1e-2 * after.norm()


def row(variant: str, microseconds: float, error: float | None, kernel: str = "") -> dict:
    about = {"model": "m", "layer": "up", "n": 4096, "k": 4096, "rows": 1, "bytes": 8e6}
    times = {"variant": variant, "microseconds": microseconds, "kernel": kernel}
    return {**about, **times, "float_error": error}


def test_the_page_sets_peers_beside_the_kernel_of_their_format(bench):
    timed = [
        row("torch bfloat16", 20.0, 0.0017),
        row("torchao int4*bfloat16", 7.0, 0.083),
        row("gemlite int4*bfloat16", 4.0, 0.3),
        row("gemlite int8/dynamic", 30.0, 0.0093),
        row("int4*bfloat16", 5.0, 0.0831, kernel="k"),
        row("int8/dynamic", 10.0, 0.009, kernel="k"),
        row("quantize + int8/dynamic", 12.0, 0.009, kernel="q, k"),
    ]
    reasons = [("torchao int8/dynamic", "no driver"), ("torchao fp8_e4m3/dynamic", "too old")]
    about = {"model": "m", "layer": "up", "rows": 1}
    left_out = [{**about, "variant": name, "reason": why} for name, why in reasons]
    facts = {"device": "a GPU", "architecture": "sm_90", "date": "today", "cuda": "13"}
    facts |= {"versions": {"torch": "2"}, "copy_gb_per_s": 2000.0}
    page = bench("gpu_table").page({**facts, "timed": timed, "left_out": left_out})
    lines = page.splitlines()
    assert "| layer | N × K | rows | torch bfloat16 | int4*bfloat16 | int8/dynamic |" in lines
    assert "| up | 4096 × 4096 | 1 | 20.0 | **5.0** | 10.0 |" in lines
    assert "| layer | N × K | rows | format | mpq | torchao | gemlite |" in lines
    start = "| up | 4096 × 4096 | 1 | "
    assert f"{start}int4*bfloat16 | 5.0 (8.3 %) | 7.0 (8.3 %) | **4.0** (30 %) |" in lines
    assert f"{start}int8/dynamic | **12.0** (0.9 %) | – | 30.0 (0.93 %) |" in lines
    assert "- torchao int8/dynamic, 1 of 1 cases: no driver" in lines
    assert "- torchao fp8_e4m3/dynamic, 1 of 1 cases: too old" in lines
    assert "up to 16 rows and quantizations: 1 of 2 cases reach 0.8" in page  # not what quantizes
    assert "against bfloat16: 1 of 1 cases reach 1; the least is 4.00" in page


def test_a_peer_that_is_not_known_is_refused(gpu):
    assert gpu.packages_of("gemlite,torchao") == ["gemlite", "torchao"]
    assert gpu.packages_of("") == []
    with pytest.raises(SystemExit, match=r"no peer awq\n  valid  torchao, gemlite"):
        gpu.packages_of("gemlite,awq")
