"""Tiny nets of every architecture that mpq-fx claims: name -> function() -> (net, its inputs).

Each list of inputs holds two shapes (batch and length, or batch and size), so that the second one
makes Dynamo build a graph with symbolic sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Inputs = list[Any]
Build = Callable[[], tuple[nn.Module, Inputs]]

VOCABULARY = 64
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def tokens(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(0, VOCABULARY, shape, generator=generator)


def values(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def ready(net: nn.Module) -> nn.Module:
    """Eval mode, no gradients, and statistics and vectors that are not all zeros and ones."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
            if tensor.ndim == 1 and tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator)
                tensor.copy_(noise + 0.5 if name.endswith(("weight", "_var")) else noise - 0.5)
    return net.eval().requires_grad_(False)


def bert() -> tuple[nn.Module, Inputs]:
    from transformers import BertConfig, BertModel

    net = ready(BertModel(BertConfig(**TEXT)))
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, 4:] = 0
    return net, [
        {"input_ids": tokens(2, 8), "attention_mask": torch.ones(2, 8, dtype=torch.long)},
        {"input_ids": tokens(3, 7), "attention_mask": mask},
    ]


def vit() -> tuple[nn.Module, Inputs]:
    from transformers import ViTConfig, ViTModel

    config = {key: value for key, value in TEXT.items() if "vocab" not in key and "pos" not in key}
    net = ready(ViTModel(ViTConfig(**config, image_size=16, patch_size=4)))
    return net, [(values(2, 3, 16, 16),), (values(3, 3, 16, 16),)]


def swin() -> tuple[nn.Module, Inputs]:
    from transformers import SwinConfig, SwinModel

    config = SwinConfig(
        image_size=16, patch_size=2, embed_dim=16, depths=[2, 1], num_heads=[2, 4], window_size=4
    )
    return ready(SwinModel(config)), [(values(2, 3, 16, 16),), (values(3, 3, 16, 16),)]


def resnet() -> tuple[nn.Module, Inputs]:
    from transformers import ResNetConfig, ResNetModel

    config = ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2])
    return ready(ResNetModel(config)), [(values(2, 3, 32, 32),), (values(3, 3, 40, 40),)]


def mobilenet() -> tuple[nn.Module, Inputs]:
    from transformers import MobileNetV2Config, MobileNetV2Model

    net = ready(MobileNetV2Model(MobileNetV2Config(depth_multiplier=0.25, min_depth=8)))
    return net, [(values(2, 3, 32, 32),), (values(3, 3, 32, 32),)]


def llama() -> tuple[nn.Module, Inputs]:
    from transformers import LlamaConfig, LlamaForCausalLM

    net = ready(LlamaForCausalLM(LlamaConfig(**TEXT, num_key_value_heads=2, use_cache=False)))
    return net, [(tokens(2, 8),), (tokens(3, 6),)]


def qwen() -> tuple[nn.Module, Inputs]:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    net = ready(Qwen2ForCausalLM(Qwen2Config(**TEXT, num_key_value_heads=2, use_cache=False)))
    return net, [(tokens(2, 8),), (tokens(3, 6),)]


def mixtral() -> tuple[nn.Module, Inputs]:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        **TEXT,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        use_cache=False,
    )
    return ready(MixtralForCausalLM(config)), [(tokens(2, 8),), (tokens(3, 6),)]


def gpt2() -> tuple[nn.Module, Inputs]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4, use_cache=False
    )
    return ready(GPT2LMHeadModel(config)), [(tokens(2, 8),), (tokens(3, 6),)]


def whisper() -> tuple[nn.Module, Inputs]:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = WhisperConfig(
        num_mel_bins=8,
        d_model=32,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=48,
        max_source_positions=12,
    )
    return ready(WhisperEncoder(config)), [(values(2, 8, 24),), (values(3, 8, 24),)]


def mamba() -> tuple[nn.Module, Inputs]:
    from transformers import MambaConfig, MambaModel

    config = MambaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, state_size=4, use_cache=False
    )
    return ready(MambaModel(config)), [(tokens(2, 3),), (tokens(3, 4),)]


class Block(nn.Module):
    """conv -> batch norm -> SiLU, twice, with a time embedding in between, as in diffusion nets."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, out, 3, padding="same", padding_mode="circular")
        self.norm = nn.BatchNorm2d(out)
        self.time = nn.Linear(8, out)
        self.second = nn.Conv2d(out, out, 3, padding=1)
        self.group = nn.GroupNorm(2, out)
        self.skip = nn.Conv2d(channels, out, 1)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = nn.functional.silu(self.norm(self.first(x)))
        y = self.dropout(y + self.time(time)[:, :, None, None])
        return nn.functional.silu(self.group(self.second(y))) + self.skip(x)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(4, 8), nn.SiLU())
        self.enter = Block(3, 8)
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.middle = Block(16, 16)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.leave = Block(16, 8)
        self.out = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        time = self.embed(time)
        top = self.enter(x, time)
        bottom = self.middle(self.down(top), time)
        return self.out(self.leave(torch.cat([self.up(bottom), top], 1), time))


def unet() -> tuple[nn.Module, Inputs]:
    first = (values(2, 3, 16, 16), values(2, 4))
    return ready(UNet()), [first, (values(3, 3, 24, 24), values(3, 4))]


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.lstm = nn.LSTM(16, 16, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(32, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(ids))[0])


def lstm() -> tuple[nn.Module, Inputs]:
    return ready(Tagger()), [(tokens(2, 8),), (tokens(3, 6),)]


class Decoder(nn.Module):
    """One decode step of a Llama with a static KV cache: tokens, where to write them, the cache."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        self.net = LlamaForCausalLM(LlamaConfig(**TEXT, num_key_value_heads=2))

    def forward(self, ids: Tensor, cache: Any) -> Tensor:
        return self.net(input_ids=ids, past_key_values=cache, use_cache=True).logits

    def new_cache(self) -> Any:
        from transformers import StaticCache

        return StaticCache(config=self.net.config, max_cache_len=16)


def decode() -> tuple[nn.Module, Inputs]:
    """Prompt, then three single tokens, all through one cache; `new_cache` makes a fresh one."""
    return ready(Decoder()), [(tokens(2, 6),), *((tokens(2, 1) + n,) for n in range(3))]


ARCHITECTURES: dict[str, Build] = {
    build.__name__: build
    for build in (
        bert, vit, swin, resnet, mobilenet, llama, qwen, mixtral, gpt2, whisper, mamba, unet, lstm,
    )
}  # fmt: skip
