"""Plug-ins: packages found by their entry points; nothing is imported before it is asked for."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import mpq_fx
from mpq_fx import plugins
from mpq_fx.errors import ConfigError, PluginError
from mpq_fx.formats import FORMATS, format_named
from mpq_fx.passes import (
    CANONICALIZE,
    METRICS,
    after,
    canonicalization,
    target_named,
    targets,
)
from mpq_fx.passes.allocate import SOLVERS

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
