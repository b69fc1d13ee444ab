"""Peak bytes between ops: live sets against what the ops of a run really hold."""

from __future__ import annotations

import torch
from torch.nn import functional

from mpq_fx.activation_memory import peak, stored_bytes
from mpq_fx.facts import Value
from mpq_fx.passes.analyze.activation_memory import live_sets
from mpq_fx.passes.analyze.trace import trace
from tests.architectures import values
from tests.passes.conftest import BF16, DYNAMIC, STATIC, WEIGHT_ONLY, subject

B, K, N = 5, 16, 24


def live(net):
    return live_sets(net.replay(), trace(net.replay(), net.calls[0]))


def held_at_most(net, call) -> int:
    """Step by step: every storage in the environment, and of the operands of the op that runs."""
    replay = net.replay()
    env, most = replay.start(call), 0
    outside = {pointer(v) for v in env.values() if isinstance(v, torch.Tensor)}
    for node in replay.gm.graph.nodes:
        if node.op == "output":
            return most
        operands = [env[n] for n in node.all_input_nodes]
        replay.step(env, node, {})
        tensors = [v for v in (*env.values(), *operands) if isinstance(v, torch.Tensor)]
        found = {pointer(t): t.untyped_storage().nbytes() for t in tensors}
        most = max(most, sum(n for p, n in found.items() if p not in outside))
    raise AssertionError


def pointer(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


def test_the_float_peak_is_what_a_run_holds_at_most(net, qkv):
    for each in (net, qkv, subject(winding, (values(K, K), values(K, K)), B, K)):
        found = live(each)
        assert peak(found, {}) == held_at_most(each, each.calls[0])


def winding(x, up, down):
    """Views, a value that lives long, and one that an output looks at."""
    y = functional.linear(x, up)
    kept = y.reshape(-1)
    z = torch.relu(functional.linear(torch.tanh(y), down)).transpose(0, 1)
    return (z * 2, kept[: 4 * 4].view(4, 4))


def test_a_view_takes_no_bytes_of_its_own_and_inputs_are_the_callers():
    net = subject(lambda x, w: (functional.linear(x.reshape(-1, K), w),), (values(N, K),), B, K)
    assert peak(live(net), {}) == 4 * B * N


def test_a_value_is_stored_in_the_format_of_all_its_readers():
    def mlp(x, up, down):
        return (functional.linear(functional.gelu(functional.linear(x, up)), down),)

    net = subject(mlp, (values(N, K), values(K, N)), B, K)
    up, down = (site.name for site in net.sites)
    found = live(net)
    # gelu(up(x)) is read by `down` alone; the op that makes it holds what it reads, too.
    assert peak(found, {}) == 4 * B * N * 2
    assert peak(found, {down: BF16}) == 4 * B * N + 2 * B * N
    assert peak(found, {down: STATIC}) == 4 * B * N + B * N
    assert peak(found, {down: WEIGHT_ONLY}) == 4 * B * N + 2 * B * N
    assert peak(found, {down: DYNAMIC}) == peak(found, {}), "its scale needs the whole value"
    assert peak(found, {up: STATIC}) == peak(found, {}), "what `up` reads is the caller's"


def test_readers_that_disagree_leave_a_value_as_it_is():
    value = Value(400, 4, ("a", "b"))
    assert stored_bytes(value, {"a": STATIC, "b": STATIC}) == 100
    assert stored_bytes(value, {"a": STATIC, "b": BF16}) == 400
    assert stored_bytes(value, {"a": STATIC}) == 400
    assert stored_bytes(Value(400, 4), {"a": STATIC}) == 400


def test_a_residual_is_stored_as_its_site_says():
    def block(x, up, down):
        s = functional.linear(x, up) + x
        return (functional.linear(torch.relu(s), down) + torch.tanh(s),)

    net = subject(block, (values(K, K), values(K, K)), B, K)
    kept = [site for site in net.sites if site.op == "residual"]
    found = live(net)
    for site in kept:
        assert peak(found, {site.name: BF16}) <= peak(found, {})


def test_no_set_is_part_of_another(net):
    found = [frozenset(map(id, sets)) for sets in live(net)]
    assert not any(a < b for a in found for b in found)
