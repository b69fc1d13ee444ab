"""Small nets to make inputs for: one with known batch norm statistics, and language models."""

from __future__ import annotations

import torch
from torch import nn

CHANNELS = 3
MEANS, DEVIATIONS = (0.5, -1.0, 2.0), (1.5, 0.5, 1.0)


class Identity(nn.Module):
    """A first convolution that copies its input, then batch norm of chosen statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False)
        self.norm = nn.BatchNorm2d(CHANNELS)
        self.head = nn.Linear(CHANNELS, 4)
        with torch.no_grad():
            self.conv.weight.copy_(torch.eye(CHANNELS)[..., None, None])
            self.norm.running_mean.copy_(torch.tensor(MEANS))
            self.norm.running_var.copy_(torch.tensor(DEVIATIONS).square())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


class Chain(nn.Module):
    """A language model that looks at the last token only: logits are a table of its own."""

    def __init__(self, vocabulary: int = 5) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, vocabulary)
        draw = torch.Generator().manual_seed(1)
        self.table.weight.data = torch.randn(vocabulary, vocabulary, generator=draw)
        self.table.weight.requires_grad_(False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table(ids)


class Both(nn.Module):
    """Tokens, positions and kinds of tokens, each with an embedding; a mask that is needed."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.kinds = nn.Embedding(16, 8), nn.Embedding(2, 8)
        self.words = nn.Embedding(11, 8, padding_idx=3)
        self.mix, self.head = nn.Linear(8, 8), nn.Linear(8, 11)

    def forward(
        self, tokens: torch.Tensor, mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> torch.Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.words(tokens) + self.positions(places) + self.kinds(token_type_ids)
        pooled = (x * mask[..., None]).sum(1, keepdim=True)
        return self.head(self.mix(x + pooled))


def gpt2(**options):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 61, "n_positions": 24}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.5}  # the past matters
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **ids, **options})).eval()
