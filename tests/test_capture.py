"""capture: the graph computes what eager computes, writes what eager writes, or is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mpq_fx.capture import capture, qualified
from mpq_fx.graph import module_path, ops, source_line
from tests.architectures import values
from tests.toy_backend import Toy, called, worst


def run(net, *inputs, grad=False, passes=()):
    """(the backend, error against eager) of one call without gradients."""
    toy = Toy(passes)
    with torch.set_grad_enabled(grad):
        copies = [x.clone() if isinstance(x, Tensor) else x for x in inputs]
        want = called(net, copies)
        return toy, worst(called(toy.compile(net), inputs), want)


class Counting(nn.Module):
    """A buffer that is read, written through a view, and read again."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        before = self.seen * 1
        self.seen[1:3].add_(x.sum())
        self.seen.mul_(2)
        return before + self.seen


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.rest = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        return self.rest[0](self.first(x).relu())


def test_a_write_through_a_view_is_seen_by_its_base():
    def net(x):
        y = x + 1
        y[0].mul_(3)
        y.view(-1)[1::2].add_(y[0, 0])
        return y * 2

    toy, error = run(net, values(3, 4))
    assert error == 0
    assert not any(name.endswith("_") for name in ops(toy.graph).split())


def test_a_mutated_buffer_is_written_once_at_the_end():
    net, reference, toy = Counting(), Counting(), Toy(())
    compiled = toy.compile(net)
    with torch.no_grad():
        for k in range(3):
            assert torch.equal(compiled(values(k + 2)), reference(values(k + 2)))
            assert torch.equal(net.seen, reference.seen)
    assert ops(toy.graph).split().count("copy_") == 1
    assert ops(toy.graph).endswith("copy_")
    assert [toy.captured[-1].parameters[name] for name in toy.captured[-1].mutated] == ["seen"]


def test_a_mutated_input_that_is_returned_stays_the_same_tensor():
    def net(x, cache):
        cache.index_copy_(0, torch.tensor([1]), x[:1])
        return cache, cache.sum()

    cache = values(3, 4)
    want = cache.clone()
    want[1] = values(2, 4)[0]
    with torch.no_grad():
        got, total = Toy().compile(net)(values(2, 4), cache)
    assert got is cache
    assert torch.equal(cache, want)
    assert torch.equal(total, want.sum())


def test_a_returned_view_of_a_mutated_input_is_refused():
    def net(x):
        x.add_(1)
        return x[1:]

    toy, error = run(net, values(3, 4))
    assert error == 0
    assert "view of an input" in toy.captured[-1].refusal


def test_inputs_that_share_memory_are_refused_if_one_is_written():
    def net(x, y):
        x.add_(1)
        return y * 2

    base, toy = values(8), Toy()
    with torch.no_grad():
        got = toy.compile(net)(base[:4], base[2:6])
    assert "share memory" in toy.captured[-1].refusal
    assert torch.equal(got, base[2:6] * 2)


def test_batch_norm_in_training_mode_still_updates_its_statistics():
    net, reference = (nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)) for _ in range(2))
    reference.load_state_dict(net.state_dict())
    with torch.no_grad():
        got, want = Toy().compile(net)(values(2, 2, 4, 4)), reference(values(2, 2, 4, 4))
    assert worst([got], [want]) < 1e-6
    assert worst([net[1].running_mean], [reference[1].running_mean]) < 1e-6


class TestAutocast:
    def test_ambient_autocast_becomes_casts(self):
        net = Net().eval()
        with torch.autocast("cpu", torch.bfloat16):
            toy, error = run(net, values(3, 4))
        assert error == 0
        casts = [n for n in toy.graph.graph.nodes if n.name.startswith(("to", "_to_copy"))]
        assert len(casts) == 5  # x, two weights, two biases
        with torch.no_grad():  # the graph itself, with no autocast around it
            args = [*net.first.parameters(), values(3, 4), *net.rest.parameters()]
            assert toy.graph(*args)[0].dtype == torch.bfloat16

    def test_a_region_ends_where_it_ends(self):
        def net(x, w):
            with torch.autocast("cpu", torch.bfloat16):
                y = x @ w
                with torch.autocast("cpu", enabled=False):
                    z = x @ w
                v = functional.linear(z, w)
            return y, z, v, functional.linear(x, w)

        toy, error = run(net, values(4, 4), values(4, 5)[:, :4].contiguous())
        assert error == 0
        assert not toy.captured[-1].refusal
        dtypes = [n.meta["val"].dtype for n in toy.graph.graph.nodes if "linear" in n.name]
        assert dtypes == [torch.bfloat16, torch.float32]

    def test_a_disabled_region_inside_ambient_autocast(self):
        def net(x, w):
            with torch.autocast("cpu", enabled=False):
                y = x @ w
            return y @ w

        with torch.autocast("cpu", torch.bfloat16):
            _, error = run(net, values(4, 4), values(4, 4) + 1)
        assert error == 0

    def test_attention_convolution_and_float32_ops(self):
        def net(x, w):
            y = functional.conv2d(x, w)
            y = functional.scaled_dot_product_attention(y, y, y)
            y = functional.interpolate(y, scale_factor=2.0, mode="nearest")
            return torch.cat([y.softmax(-1), y.exp().float()]).cumsum(-1)

        with torch.autocast("cpu", torch.bfloat16):
            toy, error = run(net, values(2, 3, 6, 6), values(3, 3, 1, 1))
        assert error == 0
        assert not toy.captured[-1].refusal

    def test_an_op_that_casts_inside_is_refused(self):
        with torch.autocast("cpu", torch.bfloat16):
            toy, error = run(lambda x, y: torch.inner(x, y), values(3, 4), values(5, 4))
        assert error == 0
        assert "casts inside" in toy.captured[-1].refusal

    def test_mutation_inside_a_region(self):
        def net(x, w):
            with torch.autocast("cpu", torch.bfloat16):
                y = x @ w
                y.add_(1)
            return y

        toy, error = run(net, values(4, 4), values(4, 4) - 1)
        assert error == 0
        assert not any(name.endswith("_") for name in ops(toy.graph).split())


def test_no_grad_regions_and_profiler_ranges_leave_no_trace():
    def net(x):
        with torch.no_grad(), torch.profiler.record_function("mine"):
            return x.sin()

    toy, error = run(net, values(4))
    assert error == 0
    assert ops(toy.graph) == "sin"


def test_inference_mode():
    toy, net = Toy(), Net()
    with torch.inference_mode():
        assert torch.equal(toy.compile(net)(values(3, 4)), net(values(3, 4)))
    assert ops(toy.graph) == "linear relu linear"


def test_vmap_keeps_the_values_of_batched_constants():
    def net(x):
        scales = torch.arange(4.0)
        inner = torch.func.vmap(lambda row, s: row.softmax(0) * s, in_dims=(1, 0))
        return inner(x, scales) + torch.func.vmap(lambda row: row * row.sum())(x.T)

    toy, error = run(net, values(3, 4))
    assert error < 1e-7
    assert not toy.captured[-1].refusal
    assert "softmax" in ops(toy.graph)


def test_symbolic_sizes_survive():
    toy, net = Toy(), Net()
    compiled = toy.compile(net)
    with torch.no_grad():
        for rows in (3, 5, 7, 11):
            assert torch.equal(compiled(values(rows, 4)), net(values(rows, 4)))
    assert len(toy.captured) == 2
    assert isinstance(toy.graph.graph.output_node().args[0][0].meta["val"].shape[0], torch.SymInt)


def test_parameters_have_their_path_and_nodes_their_module_and_line():
    toy, _ = run(Net(), values(3, 4))
    paths = set(toy.captured[-1].parameters.values())
    assert paths == {"first.weight", "first.bias", "rest.0.weight", "rest.0.bias"}
    linear = [n for n in toy.graph.graph.nodes if "linear" in n.name]
    assert [module_path(node) for node in linear] == ["first", "rest.0"]
    assert source_line(linear[0]).startswith("test_capture.py:")


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("L['self']._modules['encoder']._modules['0']._parameters['weight']", "encoder.0.weight"),
        ("L['fn']._buffers['mean']", "mean"),
        ("L['block']._modules['up']._parameters['bias']", "block.up.bias"),
        ("G['net']._modules['a']._parameters['w']", "net.a.w"),
        ("L['self'].tables[2]", "tables.2"),
    ],
)
def test_paths_read_as_a_user_writes_them(source, path):
    assert qualified(source) == path


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.eye(4).to_sparse(), "torch.sparse_coo layout"),
        (torch.eye(4, dtype=torch.complex64), "complex values"),
    ],
    ids=["sparse", "complex"],
)
def test_inputs_of_another_kind_are_refused_with_the_reason(value, reason):
    seen = []

    def backend(gm, inputs):
        seen.append(capture(gm, [value]))  # Dynamo itself skips most of these
        return gm.forward

    torch.compiler.reset()
    torch.compile(lambda x: x + 1, backend=backend)(torch.eye(4))
    assert reason in seen[0].refusal
    assert seen[0].refusal.startswith("input x has")


def test_a_graph_with_a_branch_on_data_is_refused_by_name():
    def net(x):
        return torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,))

    toy, error = run(net, values(3))
    assert error == 0
    assert "cond" in toy.captured[-1].refusal
