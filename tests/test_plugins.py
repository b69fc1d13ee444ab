"""Plug-ins: packages found by their entry points; nothing is imported before it is asked for."""

from __future__ import annotations

import sys
from dataclasses import replace
from textwrap import dedent

import pytest
import torch
from torch import nn

import mpq_fx
from mpq_fx import plugins
from mpq_fx.doctor import examine
from mpq_fx.errors import ConfigError, PluginError
from mpq_fx.facts import BFLOAT16, Site
from mpq_fx.formats import FORMATS, format_named
from mpq_fx.passes import (
    CANONICALIZE,
    METRICS,
    TARGETS,
    after,
    canonicalization,
    target_named,
    targets,
)
from mpq_fx.passes.allocate import SOLVERS
from mpq_fx.passes.lower.kernel import Kernel, Offer, with_kernels


@pytest.fixture
def install(tmp_path, monkeypatch):
    """A distribution as pip leaves it: a module, METADATA and entry_points.txt on sys.path."""
    monkeypatch.syspath_prepend(str(tmp_path))
    modules = []

    def write(package: str, code: str, **groups: str) -> None:
        (tmp_path / f"{package}.py").write_text(
            "from __future__ import annotations\n" + dedent(code)
        )
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = [f"[mpq_fx.{group}]\n{line}\n" for group, line in groups.items()]
        (info / "entry_points.txt").write_text("\n".join(lines))
        modules.append(package)
        plugins.forget()

    yield write
    for module in modules:
        sys.modules.pop(module, None)
    monkeypatch.undo()
    plugins.forget()


FORMAT = """
    from mpq_fx.formats import Format, Int
    import torch
    int6 = Format("int6", Int(6), scale=torch.float32)
"""


def test_a_format_of_a_package_stands_in_the_table(install):
    install("tiny_format", FORMAT, formats="int6 = tiny_format:int6")
    assert format_named("int6").element.bits == 6
    assert [*FORMATS][-1] == "int6"
    assert len(FORMATS) == len([*FORMATS])
    assert mpq_fx.Config(formats=["int6"]).formats == {"*": ("int6",)}


def test_without_plug_ins_only_what_mpq_has_is_there():
    assert "int6" not in FORMATS
    assert not any(plugins.load(group) for group in plugins.GROUPS)
    assert canonicalization() == CANONICALIZE


def test_a_plug_in_is_imported_when_it_is_used_and_once(install):
    install("tiny_format", FORMAT, formats="int6 = tiny_format:int6")
    assert "int6" in FORMATS
    assert format_named("int8").name == "int8"
    assert "tiny_format" not in sys.modules
    assert FORMATS["int6"] is FORMATS["int6"]
    assert "tiny_format" in sys.modules


def test_two_packages_with_one_name_are_both_named(install):
    install("tiny_one", FORMAT, formats="int6 = tiny_one:int6")
    install("tiny_two", FORMAT, formats="int6 = tiny_two:int6")
    with pytest.raises(PluginError, match="tiny_one and tiny_two both name 'int6'"):
        format_named("int8")
    assert not {"tiny_one", "tiny_two"} & set(sys.modules)


def test_a_name_that_mpq_has_cannot_be_taken(install):
    install("tiny_thief", FORMAT, formats="int8 = tiny_thief:int6")
    with pytest.raises(PluginError, match="mpq-fx and tiny_thief both name 'int8'"):
        format_named("float32")


def test_a_plug_in_under_a_name_that_is_not_its_own_is_refused(install):
    install("tiny_alias", FORMAT, formats="six = tiny_alias:int6")
    with pytest.raises(PluginError, match="declares 'six', which calls itself 'int6'"):
        format_named("six")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import no_such_module_anywhere", "ModuleNotFoundError: No module named"),
        ("1 / 0", "ZeroDivisionError"),
        ("x = 1", "AttributeError"),
    ],
)
def test_a_plug_in_that_cannot_be_loaded_says_whose_it_is(install, code, reason):
    install("tiny_broken", code, formats="int6 = tiny_broken:int6")
    assert format_named("int8").name == "int8", "what is not used does no harm"
    with pytest.raises(PluginError, match=f"'int6' of tiny_broken cannot be loaded: {reason}"):
        format_named("int6")


@pytest.mark.parametrize(
    ("group", "code", "said"),
    [
        ("formats", "thing = 3", "int, not mpq_fx.formats.Format"),
        ("targets", "thing = 'cpu'", "str, not mpq_fx.passes.lower.target.Target"),
        ("searches", "def thing(): ...", "function, not mpq_fx.passes.allocate.search.Search"),
        ("kernels", "def thing(): ...", "function, not mpq_fx.passes.lower.kernel.Kernel"),
        ("metrics", "thing = 3", "int, not a function"),
        ("passes", "thing = ()", "tuple, not a function"),
        ("solvers", "thing = 3", "int, not a function"),
    ],
)
def test_a_plug_in_of_another_type_is_refused_by_name(install, group, code, said):
    install("tiny_wrong", code, **{group: "thing = tiny_wrong:thing"})
    with pytest.raises(PluginError) as caught:
        plugins.load(group)
    assert caught.value.what == f"the plug-in 'thing' of tiny_wrong is of type {said}"
    assert caught.value.at == f"mpq_fx.{group}: tiny_wrong:thing"


def test_an_unknown_name_is_answered_with_the_nearest(install):
    install("tiny_metric", "def volume(): ...", metrics="volume = tiny_metric:volume")
    with pytest.raises(ConfigError, match="did you mean 'volume'"):
        METRICS.named("volumes")


def test_solvers_and_targets_are_merged(install):
    code = """
        from dataclasses import replace
        from mpq_fx.passes.allocate import cp_sat
        from mpq_fx.passes.lower.reference import REFERENCE
        solve = cp_sat.solve
        mirror = replace(REFERENCE, name="mirror")
    """
    install("tiny_more", code, solvers="again = tiny_more:solve", targets="mirror=tiny_more:mirror")
    assert SOLVERS["again"] is SOLVERS["cp_sat"]
    assert target_named("mirror").name == "mirror"
    assert [*targets()][-1] == "mirror"
    assert target_named("auto").name != "mirror", "a target of a plug-in is asked for by name"


def test_a_plug_in_can_be_tried_without_a_package(install):
    install("tiny_metric", "def volume(): ...", metrics="volume = tiny_metric:volume")
    plugins.add("metrics", "tried", "mpq_fx.passes.analyze.metrics.auto:auto")
    assert METRICS["tried"] is METRICS["auto"]
    plugins.add("metrics", "volume", "tiny_metric:volume")
    with pytest.raises(PluginError, match="this process and tiny_metric both name 'volume'"):
        METRICS.named("auto")
    plugins.forget()
    plugins.add("metrics", "kl", "tiny_metric:volume")
    with pytest.raises(PluginError, match="mpq-fx and this process both name 'kl'") as found:
        METRICS.named("auto")
    assert found.value.fix == "rename it there", "no package to uninstall"
    plugins.forget()
    assert "tried" not in METRICS


SEARCH = """
    from mpq_fx.passes.allocate import Search
    from mpq_fx.passes.allocate.search import candidate_of
    from dataclasses import replace

    def stay(problem, evaluator):
        plan = {unit: offers[0] for unit, offers in problem.options.items()}
        return candidate_of(problem, evaluator, plan, 0.0)

    def overdo(problem, evaluator):
        plan = {unit: offers[-1] for unit, offers in problem.options.items()}
        return candidate_of(problem, replace(evaluator, limit=1e9), plan, 0.0)

    def refuse(config):
        if config.solver != "cp_sat":
            yield f"knows cp_sat only, and there is solver={config.solver!r}"

    STAY, OVERDO = Search(stay, refuse), Search(overdo)
"""


def test_a_search_of_a_package_is_asked_held_to_its_word_and_may_refuse(install, isolated):
    install("tiny_search", SEARCH, searches="stay = tiny_search:STAY\noverdo = tiny_search:OVERDO")
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)).eval()
    batches = [torch.randn(4, 16) for _ in range(4)]

    def tune(**options):
        config = mpq_fx.Config(target="reference", tolerance=0.01, objective="size", **options)
        return mpq_fx.tune(model, batches, config=config, progress=False)

    assert {choice.name for choice in tune(search="stay").choices.values()} == {"float32"}
    with pytest.raises(PluginError, match="'overdo' ended with a plan that is not allowed"):
        tune(search="overdo")
    with pytest.raises(ConfigError, match="search='stay' knows cp_sat only"):
        tune(search="stay", solver="lagrangian")


PASS = """
    import torch
    from mpq_fx.passes import after

    def remove_double_negation(gm):
        found = 0
        for outer in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.neg.default):
            (inner,) = outer.args
            if inner.target is not outer.target:
                continue
            outer.replace_all_uses_with(inner.args[0])
            found += 1
        return found

    def place(passes):
        return after(passes, "fold_batch_norm", remove_double_negation)
"""


def test_a_pass_puts_itself_by_name(install):
    install("tiny_pass", PASS, passes="double_negation = tiny_pass:place")
    names = [p.__name__ for p in canonicalization()]
    assert names[names.index("fold_batch_norm") + 1] == "remove_double_negation"
    assert len(names) == len(CANONICALIZE) + 1


def test_a_pass_behind_nothing_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'fold_batch_norm'"):
        after(CANONICALIZE, "fold_batchnorm", lambda gm: 0)


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
