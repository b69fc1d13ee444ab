"""A late compilation may assume things about sizes that Dynamo does not guard: they are checked."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from mpq_fx.graph import placeholders
from mpq_fx.sizes import size_guard


@pytest.fixture
def symbolic():
    """A graph whose first argument is the size of its second, as Dynamo hands it over."""

    def backend(gm, inputs):
        graphs.append(gm)
        for node in placeholders(gm):
            node.meta["val"] = node.meta["example_value"]
        return gm.forward

    graphs: list = []
    torch.compiler.reset()
    torch.compile(lambda x: x * 2, backend=backend, dynamic=True)(torch.ones(6, 4))
    torch.compiler.reset()
    return graphs[0]


def sizes(gm) -> list[torch.SymInt]:
    return [n.meta["val"] for n in placeholders(gm) if isinstance(n.meta["val"], torch.SymInt)]


def test_without_assumptions_every_call_is_accepted(symbolic):
    with size_guard(symbolic) as accepts:
        pass
    assert accepts((1, 2, None))


def test_an_assumption_made_inside_the_block_is_checked_on_every_call(symbolic):
    rows, columns = sizes(symbolic)
    with size_guard(symbolic) as accepts:
        assert bool(rows % 2 == 0)
        assert bool(columns < 10)
    assert accepts((6, 4, None))
    assert accepts((8, 9, None))
    assert not accepts((7, 4, None))
    assert not accepts((6, 11, None))
    assert not accepts((7, 4, None)), "and so from memory"


def test_what_was_assumed_before_is_dynamos_to_check(symbolic):
    rows, columns = sizes(symbolic)
    assert bool(rows > 3)
    with size_guard(symbolic) as accepts:
        assert bool(columns > 3)
    assert accepts((1, 4, None))
    assert not accepts((6, 1, None))


def test_assumptions_are_recorded_although_dynamo_froze_its_guards(symbolic):
    rows, _ = sizes(symbolic)
    env = rows.node.shape_env
    env.frozen = True
    try:
        with size_guard(symbolic) as accepts:
            assert bool(rows == 6)
        assert env.frozen
    finally:
        env.frozen = False
    assert accepts((6, 4, None))
    assert not accepts((5, 4, None))


def test_a_graph_of_plain_sizes_needs_no_guard():
    gm = make_fx(lambda x: x * 2)(torch.ones(3))
    with size_guard(gm) as accepts:
        pass
    assert accepts((torch.ones(99),))
