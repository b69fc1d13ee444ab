"""One line per rewrite: the graph before and after, and the same numbers from both."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.nn import functional

from mpq_fx.graph import ops, run_passes, signature_of
from mpq_fx.passes import CANONICALIZE
from tests.architectures import values
from tests.toy_backend import graph_of, worst

X, W, V, B = values(2, 3, 4), values(5, 4), values(4, 5), values(5)
ROWS, IMAGE, KERNEL = values(6, 4), values(2, 4, 8, 8), values(6, 4, 3, 3)


def canonical(function, inputs, weights=()):
    """The canonical graph as one line, after the laws: signature, values, a second run is idle."""
    gm = graph_of(function, inputs, weights)
    signature = signature_of(gm)
    with torch.no_grad():
        want = gm(*inputs, *weights)
        run_passes(gm, CANONICALIZE)
        assert worst([gm(*inputs, *weights)], [want]) < 1e-6
    assert signature_of(gm) == signature
    assert [apply(gm) for apply in CANONICALIZE] == [0] * len(CANONICALIZE)
    return ops(gm)


LINEAR = {
    "addmm of a transpose": (lambda x, w, b: torch.addmm(b, x, w.t()), ROWS, (W, B), "linear"),
    "addmm as GPT-2 does": (lambda x, w, b: torch.addmm(b, x, w), ROWS, (V, B), "t linear"),
    "x @ w.T": (lambda x, w: x @ w.T, X, (W,), "linear"),
    "x @ w.mT": (lambda x, w: x @ w.mT, X, (W,), "linear"),
    "x @ w": (lambda x, w: x @ w, X, (V,), "t linear"),
    "mm": (lambda x, w: torch.mm(x, w), ROWS, (V,), "t linear"),
    "x @ w + b": (lambda x, w, b: x @ w.permute(1, 0) + b, X, (W, B), "linear"),
    "b + linear": (lambda x, w, b: b + functional.linear(x, w), X, (W, B), "linear"),
    "w @ x.mT, as in Mamba": (
        lambda x, w: w @ x.transpose(1, 2), X, (W,), "linear transpose",
    ),
    "one row": (lambda x, w: x @ w, values(4), (V,), "t linear"),
    "einsum bsd,hd": (lambda x, w: torch.einsum("bsd,hd->bsh", x, w), X, (W,), "linear"),
    "einsum bsd,dh": (lambda x, w: torch.einsum("bsd,dh->bsh", x, w), X, (V,), "permute linear"),
    "einsum ...d,hd": (lambda x, w: torch.einsum("...d, hd -> ...h", x, w), X, (W,), "linear"),
    "einsum, weight first": (lambda x, w: torch.einsum("hd,bsd->bsh", w, x), X, (W,), "linear"),
    "einsum to heads": (
        lambda x, w: torch.einsum("bsd,dhe->bshe", x, w), X, (values(4, 2, 3),),
        "permute flatten linear unflatten",
    ),
    "einsum from heads": (
        lambda x, w: torch.einsum("bshe,hed->bsd", x, w), values(2, 3, 2, 5), (values(2, 5, 4),),
        "permute flatten flatten linear",
    ),
    "a bias that a call computes": (
        lambda x, w: functional.linear(x, w, x.mean((0, 1)).repeat(2)[:5]), X, (W,),
        "mean repeat slice linear add",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("function", "x", "weights", "line"), LINEAR.values(), ids=LINEAR)
def test_products_with_a_weight_become_linear(function, x, weights, line):
    assert canonical(function, [x], weights) == line


OTHERS = {
    "two activations": (lambda x, y: x @ y, (X, values(2, 4, 3)), (), "matmul"),
    "scaled addmm": (
        lambda x, w, b: torch.addmm(b, x, w, alpha=2.0), (ROWS,), (V, B), "addmm",
    ),
    "matrix bias": (lambda x, w, b: torch.addmm(b, x, w), (ROWS,), (V, values(6, 5)), "addmm"),
    "outer einsum": (
        lambda x, w: torch.einsum("bsd,bhd->bsh", x, w), (X,), (values(2, 5, 4),), "einsum",
    ),
    "diagonal einsum": (
        lambda x, w: torch.einsum("bsd,dd->bsd", x, w), (X,), (values(4, 4),), "einsum",
    ),
    "a bias that is computed": (
        lambda x, b, w: functional.linear(x, w) + b, (X, B), (W,), "linear add",
    ),
    "a sum that others need": (
        lambda x, w, b: torch.stack([(y := functional.linear(x, w)) + b, y]), (X,), (W, B),
        "linear add stack",
    ),
    "a scaled sum": (
        lambda x, w, b: torch.add(functional.linear(x, w), b, alpha=2), (X,), (W, B), "linear add",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("function", "inputs", "weights", "line"), OTHERS.values(), ids=OTHERS)
def test_other_products_stay(function, inputs, weights, line):
    assert canonical(function, inputs, weights) == line


IDENTITIES = {
    "dropout": (lambda x: functional.dropout(x, 0.5, training=False) + 1, "add"),
    "feature dropout": (lambda x: functional.dropout2d(x[None], training=False)[0] + 1,
                        "unsqueeze select add"),
    "detach": (lambda x: x.detach() + 1, "add"),
    "contiguous": (lambda x: x.contiguous() + 1, "add"),
    "contiguous that copies": (lambda x: x.mT.contiguous() + 1, "mT contiguous add"),
    "same dtype": (lambda x: x.float() + x.to("cpu", torch.float32) + x.type_as(x), "add add"),
    "another dtype": (lambda x: x.double() + x.type(torch.bfloat16), "to to add"),
    "same view": (lambda x: x.view(2, 3, 4).expand(2, 3, 4) + 1, "add"),
    "another view": (lambda x: x.view(6, 4) + 1, "view add"),
    "a returned copy": (lambda x: x.clone(), "clone"),
    "an inner copy": (lambda x: x.clone() + 1, "add"),
}  # fmt: skip


@pytest.mark.parametrize(("function", "line"), IDENTITIES.values(), ids=IDENTITIES)
def test_what_does_nothing_is_removed(function, line):
    assert canonical(function, [X]).replace("__getitem__", "select") == line


def test_training_dropout_stays():
    gm = graph_of(lambda x: functional.dropout(x, 0.5, training=True), [X])
    run_passes(gm, CANONICALIZE)
    assert ops(gm) == "dropout"


CONVOLUTIONS = {
    "default": (lambda x, w: functional.conv2d(x, w), "conv2d"),
    "convolution": (
        lambda x, w: torch.convolution(x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1),
        "conv2d",
    ),
    "same": (lambda x, w: functional.conv2d(x, w, padding="same", dilation=2), "conv2d"),
    "same, even kernel": (
        lambda x, w: functional.conv2d(x, w[:, :, :2], padding="same"),
        "slice constant_pad_nd conv2d",
    ),
    "reflect": (
        lambda x, w: functional.conv2d(functional.pad(x, (1, 1, 1, 1), "reflect"), w), "pad conv2d",
    ),
    "three dimensions": (
        lambda x, w: functional.conv3d(x[:, None], w[:, None, 1:], padding=(1, 0, 0)),
        "unsqueeze unsqueeze slice conv3d",
    ),
    "transposed": (
        lambda x, w: functional.conv_transpose2d(x, w[:4], stride=2), "slice conv_transpose2d",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize(("function", "line"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolutions_have_one_spelling(function, line):
    assert canonical(function, [IMAGE], [KERNEL]) == line
    gm = graph_of(function, [IMAGE], [KERNEL])
    run_passes(gm, CANONICALIZE)
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default):
        assert len(node.args) == 7
        assert [len(sizes) for sizes in node.args[3:6]] == [2, 2, 2]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@settings(max_examples=40)
@given(
    dims=st.integers(1, 2),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 2),
    padding=st.sampled_from([0, 1, 2, "same", "valid"]),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 4]),
    bias=st.booleans(),
)
def test_every_convolution_keeps_its_values(dims, kernel, stride, padding, dilation, groups, bias):
    stride = 1 if padding == "same" else stride
    conv, size = (functional.conv1d, functional.conv2d)[dims - 1], [9] * dims
    weights = [values(8, 4 // groups, *[kernel] * dims), *([values(8)] if bias else [])]

    def plain(x, w):
        return conv(x, w, None, stride, padding, dilation, groups)

    def biased(x, w, b):
        return conv(x, w, b, stride, padding, dilation, groups)

    line = canonical(biased if bias else plain, [values(2, 4, *size)], weights)
    assert line.split()[-1] == f"conv{dims}d"


def norm(channels):
    return (
        values(channels).abs() + 0.5,
        values(channels),
        values(channels) * 0.3,
        values(channels).abs() + 0.2,
    )


def batch_norm(x, gamma, beta, mean, var):
    return functional.batch_norm(x, mean, var, gamma, beta, training=False)


class TestBatchNorm:
    def test_folds_into_a_convolution_with_one_reader(self):
        def net(x, w, b, *statistics):
            return batch_norm(functional.conv2d(x, w, b), *statistics).relu()

        line = canonical(net, [IMAGE], [KERNEL, values(6), *norm(6)])
        assert line.endswith("conv2d relu")
        assert "batch_norm" not in line

    def test_folds_without_bias_and_without_affine(self):
        def net(x, w, mean, var):
            return functional.batch_norm(functional.conv2d(x, w, groups=2), mean, var)

        line = canonical(net, [IMAGE], [KERNEL[:, :2], *norm(6)[2:]])
        assert "batch_norm" not in line

    def test_folds_into_a_linear_on_rows(self):
        def net(x, w, *statistics):
            return batch_norm(functional.linear(x, w), *statistics)

        assert canonical(net, [ROWS], [W, *norm(5)]).endswith("linear")

    def test_folded_weights_follow_the_parameters(self):
        def net(x, w, *statistics):
            return batch_norm(functional.conv2d(x, w), *statistics)

        weights = [KERNEL, *norm(6)]
        gm = graph_of(net, [IMAGE], weights)
        run_passes(gm, CANONICALIZE)
        edited = [weight * 2 for weight in weights]
        with torch.no_grad():
            assert worst([gm(IMAGE, *edited)], [net(IMAGE, *edited)]) < 1e-6

    @pytest.mark.parametrize("why", ["training", "two readers", "after a linear on sequences"])
    def test_stays_where_it_cannot_be_folded(self, why):
        def net(x, w, *statistics):
            y = functional.linear(x, w).mT if "linear" in why else functional.conv2d(x, w)
            if why == "training":
                return functional.batch_norm(y, None, None, *statistics[:2], training=True)
            z = batch_norm(y, *statistics)
            return z + y if why == "two readers" else z

        x, w = (X, W) if "linear" in why else (IMAGE, KERNEL)
        gm = graph_of(net, [x], [w, *norm(w.shape[0])])
        run_passes(gm, CANONICALIZE)
        assert "batch_norm" in ops(gm)

    def test_both_spellings_fold(self):
        def net(x, w, gamma, beta, mean, var):
            y = functional.conv2d(x, w)
            op = torch.ops.aten._native_batch_norm_legit_no_training
            return op(y, gamma, beta, mean, var, 0.1, 1e-5)[0]

        assert "batch_norm" not in canonical(net, [IMAGE], [KERNEL, *norm(6)])


def test_attention_stays_whole():
    net = nn.MultiheadAttention(8, 2, batch_first=True)

    def attend(x, w, b, out, c):
        q, k, v = (
            y.unflatten(-1, (2, 4)).transpose(1, 2) for y in functional.linear(x, w, b).chunk(3, -1)
        )
        y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return functional.linear(y, out, c)

    weights = [net.in_proj_weight, net.in_proj_bias, net.out_proj.weight, net.out_proj.bias]
    line = canonical(attend, [values(2, 3, 8)], [weight.detach() for weight in weights])
    assert "scaled_dot_product_attention" in line
    assert line.split().count("linear") == 2
