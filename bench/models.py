"""name, batch -> Case: a network with random weights and a source of inputs.

Latency does not depend on the values of weights, so none are downloaded; accuracy claims come from
trained networks elsewhere.  `size="tiny"` builds the same architectures for tests.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Inputs = tuple[Tensor, ...]
SIZES = ("full", "tiny")
BATCHES = (1, 8)
NORM_CALLS = 2  # calls in training mode, which move the statistics of batch norm
WARM_UP, MEASURED, CALIBRATION = 10_000, 0, 1_000  # first seeds: no two ranges of draws meet


@dataclass(frozen=True)
class Recipe:
    """A configuration of transformers, its arguments per size, and the shape of one input."""

    config: str
    network: str
    length: Mapping[str, int]  # tokens of a text, or pixels of one side of an image
    vocabulary: str = ""  # the argument that holds it; "" for images
    arguments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)  # of the network, in every size
    is_transformer: bool = True


@dataclass(frozen=True)
class Case:
    """A network in eval mode and `draw`, its inputs by number."""

    name: str
    batch: int
    model: nn.Module
    shape: tuple[int, ...]
    vocabulary: int  # 0 for images
    is_transformer: bool

    def draw(self, seed: int) -> Inputs:
        """Uniform tokens or normal pixels, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        if self.vocabulary:
            return (torch.randint(0, self.vocabulary, self.shape, generator=generator),)
        return (torch.randn(self.shape, generator=generator),)

    def calibration(self, count: int) -> list[Inputs]:
        """Draws that are never measured."""
        return [self.draw(CALIBRATION + k) for k in range(count)]


MODELS = {
    "bert-base": Recipe(
        "BertConfig",
        "BertModel",  # its hidden states: two logits of a random head are noise
        {"full": 128, "tiny": 16},
        options={"add_pooling_layer": False},
        vocabulary="vocab_size",
        arguments={
            "full": {"vocab_size": 30522},
            "tiny": {
                "vocab_size": 64,
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 64,
            },
        },
    ),
    "resnet50": Recipe(
        "ResNetConfig",
        "ResNetForImageClassification",
        {"full": 224, "tiny": 32},
        arguments={
            "full": {"num_labels": 1000},
            "tiny": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
        },
        is_transformer=False,
    ),
    "mobilenetv2": Recipe(
        "MobileNetV2Config",
        "MobileNetV2ForImageClassification",
        {"full": 224, "tiny": 32},
        arguments={
            "full": {"num_labels": 1001},
            "tiny": {"depth_multiplier": 0.25, "num_labels": 8},
        },
        is_transformer=False,
    ),
    "vit-small": Recipe(
        "ViTConfig",
        "ViTForImageClassification",
        {"full": 224, "tiny": 32},
        arguments={
            "full": {
                "hidden_size": 384,
                "num_attention_heads": 6,
                "intermediate_size": 1536,
                "num_labels": 1000,
            },
            "tiny": {
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 64,
                "image_size": 32,
            },
        },
    ),
    "llama-prefill": Recipe(
        "LlamaConfig",
        "LlamaForCausalLM",
        {"full": 256, "tiny": 16},
        vocabulary="vocab_size",
        arguments={
            "full": {
                "hidden_size": 1024,
                "intermediate_size": 2816,
                "num_hidden_layers": 8,
                "num_attention_heads": 16,
                "num_key_value_heads": 16,
                "vocab_size": 8000,
                "use_cache": False,
            },
            "tiny": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "vocab_size": 64,
                "use_cache": False,
            },
        },
    ),
}


class FirstOutput(nn.Module):
    """x -> net(x)[0]: one tensor in and one out, which every peer can export."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x, return_dict=False)[0]


def build(name: str, batch: int, size: str = "full") -> Case:
    """The network of that name with seeded weights; needs transformers."""
    recipe = MODELS[name]
    transformers = importlib.import_module("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, recipe.config)(**recipe.arguments[size])
    model = FirstOutput(getattr(transformers, recipe.network)(config, **recipe.options))
    length = recipe.length[size]
    vocabulary = getattr(config, recipe.vocabulary) if recipe.vocabulary else 0
    shape = (batch, length) if vocabulary else (batch, 3, length, length)
    case = Case(name, batch, model, shape, vocabulary, recipe.is_transformer)
    settle_norms(case)
    model.eval().requires_grad_(False)
    return case


def settle_norms(case: Case) -> None:
    """Batch norm whose statistics differ per channel, and no vector of zeros or ones.

    The statistics go only part of the way to those of the inputs: with exact ones a deep random
    network is chaotic, and bfloat16 alone loses a tenth of the output, unlike in a trained one.
    """
    norms = [m for m in case.model.modules() if isinstance(m, nn.BatchNorm2d)]
    if not norms:
        return
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(std=0.1)
        case.model.train()
        for k in range(NORM_CALLS):
            case.model(*case.draw(WARM_UP + k))
