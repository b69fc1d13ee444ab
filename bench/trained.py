"""name -> Net: a network that has learned, inputs to calibrate it with, and a task to judge it by.

Digits come with scikit-learn, MiniLM with its package, and the text to classify is what is at hand
on every machine that runs this: the documentation strings of installed packages, one class each.
"""

from __future__ import annotations

import ast
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpq_fx.demo.nets import (
    DIGITS,
    SENTENCES,
    Batch,
    Cnn,
    Layer,
    Vit,
    digits,
    minilm,
    trained,
)

CALLS = 8  # of a calibration
PACKAGES = ("numpy", "sklearn", "sympy", "torch", "transformers")  # the classes of the text task
TEXTS, WORDS, VOCABULARY = 400, 48, 4096  # per class; in a text; hashed


@dataclass(frozen=True)
class Net:
    """`pool` holds rows to calibrate with, `measured` batches that are only for judging.

    `judge` maps the outputs on `measured`, those of the float net and the right answers, row by
    row, to a number that is better when higher; accuracies that differ by less than 1 / `examples`
    are the same.
    """

    name: str
    model: nn.Module
    pool: Batch
    size: int  # rows in a batch
    measured: tuple[Batch, ...]
    answers: Tensor
    judge: Callable[[Tensor, Tensor, Tensor], float]
    score_name: str

    @property
    def examples(self) -> int:
        return sum(len(batch[0]) for batch in self.measured)

    def score(self, outputs: Tensor, reference: Tensor) -> float:
        return self.judge(outputs, reference, self.answers)

    def calibration(self, seed: int) -> list[Batch]:
        """CALLS batches of rows drawn from the pool without repetition."""
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(self.pool[0]), generator=generator)[: CALLS * self.size]
        return [tuple(x[rows] for x in self.pool) for rows in chosen.split(self.size)]


class Residual(nn.Module):
    """relu(x + body(x)), the shortcut a 1×1 convolution where sizes change"""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False),
            nn.BatchNorm2d(after),
        )
        same = before == after and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.shortcut(x) + self.body(x))


class Inverted(nn.Module):
    """x + project(depthwise(expand(x))), without the sum where sizes change (MobileNetV2)"""

    def __init__(self, before: int, after: int, stride: int, expansion: int = 4) -> None:
        super().__init__()
        inner = before * expansion
        self.body = nn.Sequential(
            nn.Conv2d(before, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU6(),
            nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU6(),
            nn.Conv2d(inner, after, 1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.is_residual = before == after and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.is_residual else self.body(x)


class TextClassifier(nn.Module):
    """hashed words -> classes: an embedding, two transformer layers, the mean over words"""

    def __init__(self, width: int = 64, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, width)
        self.position = nn.Parameter(0.02 * torch.randn(1, WORDS, width))
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(PACKAGES))

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words) + self.position
        return self.head(self.norm(self.layers(x)).mean(1))


def resnet() -> nn.Module:
    stem = (nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    blocks = (Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 32, 1), Residual(32, 64, 2))
    return nn.Sequential(*stem, *blocks, *_head(64))


def mobilenet() -> nn.Module:
    stem = (nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
    blocks = (Inverted(16, 24, 2), Inverted(24, 24, 1), Inverted(24, 40, 2), Inverted(40, 40, 1))
    return nn.Sequential(*stem, *blocks, *_head(40))


def _head(width: int) -> tuple[nn.Module, ...]:
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)


def on_digits(name: str, build: Callable[[], nn.Module], epochs: int) -> Net:
    images, labels, test_images, test_labels = digits()
    torch.manual_seed(0)
    model = trained(build(), images, labels, epochs)
    return _classifier(name, model, images, test_images, test_labels, DIGITS)


def text() -> Net:
    """The share of texts whose package is found; tests are of files that training never saw."""
    words, labels, test_words, test_labels = documentation()
    torch.manual_seed(0)
    model = trained(TextClassifier(), words, labels, epochs=12)
    return _classifier("text", model, words, test_words, test_labels, DIGITS)


def _classifier(
    name: str, model: nn.Module, rows: Tensor, tests: Tensor, answers: Tensor, size: int
) -> Net:
    whole = len(tests) // size * size
    measured = tuple((x,) for x in tests[:whole].split(size))
    return Net(name, model, (rows,), size, measured, answers[:whole], accuracy, "accuracy")


def accuracy(outputs: Tensor, reference: Tensor, answers: Tensor) -> float:
    """Share of rows whose largest output is that of the right class."""
    return float((outputs.argmax(1) == answers).double().mean())


def cosine(outputs: Tensor, reference: Tensor, answers: Tensor) -> float:
    """Mean cosine of an embedding and its float twin."""
    return float(functional.cosine_similarity(outputs, reference, dim=1).double().mean())


def sentences() -> Net:
    """MiniLM, which has no right answers but those of its float twin."""
    found = minilm()
    pool = tuple(torch.cat(column) for column in zip(*found.calibration, strict=True))
    unseen, none = found.measured, torch.zeros(0)
    return Net("minilm", found.model, pool, SENTENCES, unseen, none, cosine, "cosine")


def documentation() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(words, packages) of texts to train on, and of those of every fifth file to test with."""
    rows: dict[bool, list[tuple[list[int], int]]] = {False: [], True: []}
    for label, package in enumerate(PACKAGES):
        for is_test, most in ((False, TEXTS), (True, TEXTS // 4)):
            found = islice(_texts(package, is_test), most)
            rows[is_test] += [(hashed(text), label) for text in found]
    train, test = (
        (torch.tensor([w for w, _ in kept]), torch.tensor([k for _, k in kept]))
        for kept in (rows[False], rows[True])
    )
    mixed = torch.randperm(len(test[1]), generator=torch.Generator().manual_seed(0))
    return *train, test[0][mixed], test[1][mixed]


def _texts(package: str, is_test: bool) -> Iterator[str]:
    """Documentation strings of functions and classes, file by file, without the package's name."""
    found = find_spec(package)
    assert found is not None, f"{package} is not installed"
    files = sorted(Path(str(found.origin)).parent.rglob("*.py"))
    for k, file in enumerate(files):
        if (k % 5 == 0) == is_test and "test" not in str(file):
            yield from (re.sub(package, "", t, flags=re.I) for t in documented(file))


def documented(file: Path) -> Iterator[str]:
    """What has at least WORDS words."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            text = ast.get_docstring(node) or ""
            if len(text.split()) >= WORDS:
                yield text


def hashed(text: str) -> list[int]:
    words = re.findall(r"[a-z]+", text.lower())[:WORDS]
    return [zlib.crc32(w.encode()) % VOCABULARY for w in words] + [0] * (WORDS - len(words))


NETS: Mapping[str, Callable[[], Net]] = {
    "cnn": lambda: on_digits("cnn", Cnn, epochs=6),
    "resnet": lambda: on_digits("resnet", resnet, epochs=10),
    "mobilenet": lambda: on_digits("mobilenet", mobilenet, epochs=20),
    "vit": lambda: on_digits("vit", Vit, epochs=15),
    "text": text,
    "minilm": sentences,
}
