"""one op for a whole module  ->  its linear layers, norms, attention and gates

In eval mode without gradients nn.TransformerEncoderLayer and nn.MultiheadAttention call one op of
PyTorch for all they compute, recurrent cells always do.  Its weights could run in no other
precision: here it is written as the module writes itself where it may not take that road, a cell
as its documentation does.  A query that may look at no key at all attends to nothing, as there; the
op has NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def attention(  # noqa: PLR0913 -- the op's
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_head: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """proj(softmax(q kᵀ / √d + mask) v), and the softmax or its mean over heads if asked

    query [batch, tokens, features], and key and value are the same tensor: modules call the op for
    self-attention only.  mask_type 1: a mask [batch, tokens] of keys; else one that broadcasts to
    [batch, heads, tokens, tokens].
    """
    qkv = functional.linear(query, qkv_weight, qkv_bias).chunk(3, -1)
    q, k, v = (x.unflatten(-1, (num_head, -1)).transpose(1, 2) for x in qkv)
    bias = _bias(mask, mask_type, query.dtype)
    weights = None
    if need_weights:
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
        weights = (scores if bias is None else scores + bias).softmax(-1)
        heads = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        heads = functional.scaled_dot_product_attention(q, k, v, bias)
    return functional.linear(heads.transpose(1, 2).flatten(2), proj_weight, proj_bias), weights


def _bias(mask: Tensor | None, mask_type: int | None, dtype: torch.dtype) -> Tensor | None:
    """What is added to the scores; modules hand over floats, a mask of bools is True at no key."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
    return mask[:, None, None, :] if mask_type == 1 else mask


def encoder_layer(  # noqa: PLR0913 -- the op's
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """norm_first: x + f(norm(x)), else norm(x + f(x)), f first attention, then the two linears"""
    projections = (embed_dim, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias)

    def attend(x: Tensor) -> Tensor:
        return attention(x, x, x, *projections, mask, need_weights=False, mask_type=mask_type)[0]

    def feed(x: Tensor) -> Tensor:
        x = functional.linear(x, ffn_weight_1, ffn_bias_1)
        x = functional.gelu(x) if use_gelu else functional.relu(x)
        return functional.linear(x, ffn_weight_2, ffn_bias_2)

    norms = ((norm_weight_1, norm_bias_1), (norm_weight_2, norm_bias_2))
    for part, norm in zip((attend, feed), norms, strict=True):
        if norm_first:
            src = src + part(functional.layer_norm(src, (embed_dim,), *norm, eps))
        else:
            src = functional.layer_norm(src + part(src), (embed_dim,), *norm, eps)
    return src


def lstm_cell(
    x: Tensor,
    hx: tuple[Tensor, Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """c' = σ(f) c + σ(i) tanh(g),  h' = σ(o) tanh(c'),  of (i, f, g, o) = W x + b + W' h + b'"""
    h, c = hx
    gates = functional.linear(x, w_ih, b_ih) + functional.linear(h, w_hh, b_hh)
    i, f, g, o = gates.chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru_cell(
    x: Tensor,
    h: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """h' = n + σ(z) (h - n),  n = tanh(x_n + σ(r) h_n),  of r, z and n in W x + b and W' h + b'"""
    x_r, x_z, x_n = functional.linear(x, w_ih, b_ih).chunk(3, -1)
    h_r, h_z, h_n = functional.linear(h, w_hh, b_hh).chunk(3, -1)
    n = (x_n + (x_r + h_r).sigmoid() * h_n).tanh()
    return n + (x_z + h_z).sigmoid() * (h - n)


# What Dynamo's graph calls -> what is traced instead.
PARTS: Mapping[Any, Callable[..., Any]] = {
    torch._transformer_encoder_layer_fwd: encoder_layer,
    torch._native_multi_head_attention: attention,
    torch.lstm_cell: lstm_cell,
    torch.gru_cell: gru_cell,
}
