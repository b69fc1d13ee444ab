"""ids[t + 1] ~ softmax(logits(ids[..t]) / temperature), or uniform over the vocabulary

The vocabulary is that of the embedding which reads the ids.  LLM-QAT (arXiv 2305.17888) calibrates
on sequences that the model wrote from a random first token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpq_fx.errors import CalibrationError, ConfigError
from mpq_fx.progress import progress_bar
from mpq_fx.registry import root_of
from mpq_fx.synthetic.origin import Keywords, Origin
from mpq_fx.synthetic.probe import (
    OWN_BATCHES,
    accepted,
    check_positive,
    home_of,
    is_required,
    parameters_of_forward,
    sizes_of,
    undisturbed,
)

SPECIAL = tuple(
    f"{name}_token_id"
    for name in ("pad", "bos", "eos", "sep", "cls", "mask", "unk", "decoder_start")
)
CAUSAL = 1e-3  # what rounding may change of earlier logits, relative to the largest


@dataclass(frozen=True)
class Reader:
    """How a model takes ids: the name of their argument, and of those made beside them."""

    ids: str
    ones: tuple[str, ...]  # masks: no position is padding
    zeros: tuple[str, ...]  # kinds of tokens
    second: tuple[str, ...]  # ids of a decoder beside the encoder
    quiet: tuple[str, ...]  # switches that are off while sequences are sampled

    def batch(self, ids: Tensor, second: Tensor | None = None) -> dict[str, Tensor]:
        given = {self.ids: ids}
        given |= {name: torch.ones_like(ids) for name in self.ones}
        given |= {name: torch.zeros_like(ids) for name in self.zeros}
        return given | dict.fromkeys(self.second, ids if second is None else second)


@dataclass(frozen=True)
class Dice:
    """How the next token is drawn."""

    temperature: float
    top_k: int | None
    banned: tuple[int, ...]
    draw: torch.Generator

    def thrown(self, logits: Tensor) -> Tensor:
        """[rows, vocabulary] -> an id per row, [rows, 1]; on the CPU all devices draw alike."""
        scores = logits / self.temperature
        if bool(scores.isnan().any()):
            raise CalibrationError("the model's logits hold NaN", fix="weights that are finite")
        scores[:, list(self.banned)] = -torch.inf
        if self.top_k is not None and self.top_k < scores.shape[1]:
            kept = scores.topk(self.top_k).indices
            scores = torch.full_like(scores, -torch.inf).scatter(1, kept, scores.gather(1, kept))
        return torch.multinomial(scores.softmax(1), 1, generator=self.draw)


def random_tokens(
    model: nn.Module,
    shape: Sequence[int],
    *,
    count: int = 8,
    vocabulary: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> list[Keywords]:
    """`count` batches of (rows, tokens) drawn uniformly from the vocabulary without special ids.

    Masks say that no token is padding.  `vocabulary` is the number of ids, for a model whose ids no
    nn.Embedding reads.  Raises ConfigError where forward needs more than ids and masks.
    """
    sizes = _rows_and_tokens(shape)
    check_positive(count=count)
    reader, (device, _) = reader_of(model), home_of(model)
    size, padding = _vocabulary(model, reader, sizes[1], vocabulary)
    banned = padding | specials(model)
    allowed = torch.tensor([k for k in range(size) if k not in banned])
    if not len(allowed):
        raise CalibrationError(f"all {size} ids of the vocabulary are special", fix=OWN_BATCHES)
    draw = torch.Generator().manual_seed(seed)
    origin = Origin("random_tokens", "random token ids", {"seed": seed, "vocabulary": size})
    batches = []
    for _ in range(count):
        ids, second = (
            allowed[torch.randint(len(allowed), sizes, generator=draw)].to(device) for _ in range(2)
        )
        batches.append(Keywords(reader.batch(ids, second), origin))
    return batches


def sampled(  # noqa: PLR0913 -- options of the user, all by name
    model: nn.Module,
    shape: Sequence[int],
    *,
    count: int = 8,
    temperature: float = 1.0,
    top_k: int | None = None,
    first: int | None = None,
    vocabulary: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> list[Keywords]:
    """`count` batches of (rows, tokens) that a causal language model writes itself.

    The first token is the id `first`, else uniform over the vocabulary; each next one is drawn from
    the model's own distribution, of the `top_k` likeliest where given, never padding.  Takes
    count × tokens calls, without a cache.  Raises CalibrationError for a model whose output is no
    logits over the vocabulary, or that looks ahead.
    """
    rows, length = _rows_and_tokens(shape)
    check_positive(count=count, temperature=temperature, top_k=top_k)
    reader, (device, _) = _writer_of(model), home_of(model)
    size, padding = _vocabulary(model, reader, length, vocabulary)
    _check_first(first, size)
    draw = torch.Generator().manual_seed(seed)
    facts = {"seed": seed, "vocabulary": size, "temperature": temperature, "top_k": top_k}
    origin = Origin("sampled", "sampled from the model itself", facts)
    batches = []
    with undisturbed(model) as run, progress_bar(progress) as bar, torch.no_grad():
        score = _causal(_scorer(run, reader, size, device), length, size)
        task = bar.add_task("sampling", total=count * (length - 1))
        dice = Dice(temperature, top_k, tuple(sorted(padding)), draw)
        for _ in range(count):
            ids = torch.randint(size, (rows, 1), generator=draw)
            ids = ids if first is None else torch.full_like(ids, first)
            for _ in range(length - 1):
                ids = torch.cat([ids, dice.thrown(score(ids)[:, -1])], 1)
                bar.advance(task)
            batches.append(Keywords(reader.batch(ids.to(device)), origin))
    return batches


def reader_of(model: nn.Module) -> Reader:
    """What to pass to forward, from its signature: ids, and what it needs or knows beside them."""
    parameters = parameters_of_forward(model)
    names = [p.name for p in parameters]
    if not names:
        raise ConfigError(f"{type(model).__name__}.forward has no named input", fix=OWN_BATCHES)
    ids = "input_ids" if "input_ids" in names else names[0]
    others = [p for p in parameters if p.name != ids]
    needed = [p.name for p in others if is_required(p)]
    masks = tuple(n for n in names if n == "attention_mask" or (n in needed and "mask" in n))
    kinds = tuple(n for n in needed if "type_ids" in n or "segment" in n)
    second = tuple(n for n in names if n == "decoder_input_ids")
    if unknown := set(needed) - {*masks, *kinds, *second}:
        raise ConfigError(
            f"{type(model).__name__}.forward needs {', '.join(sorted(unknown))}, which token ids "
            "do not tell",
            fix=OWN_BATCHES,
        )
    return Reader(ids, masks, kinds, second, tuple(n for n in names if n == "use_cache"))


def _writer_of(model: nn.Module) -> Reader:
    reader = reader_of(model)
    if reader.second:
        raise CalibrationError(
            f"{type(model).__name__} reads one sequence and writes another, so it cannot go on "
            "with its own",
            fix="mpq_fx.synthetic.random_tokens(model, shape)",
        )
    return reader


def specials(model: nn.Module) -> set[int]:
    """Ids that the model's config, if it has one, names as padding, start, end, …"""
    config = getattr(root_of(model), "config", None)
    named = [getattr(config, name, None) for name in SPECIAL]
    listed = [n for each in named for n in (each if isinstance(each, (list, tuple)) else (each,))]
    return {n for n in listed if isinstance(n, int)}


def _vocabulary(
    model: nn.Module, reader: Reader, length: int, given: int | None
) -> tuple[int, set[int]]:
    """(number of ids, those that are padding), of the embeddings that read the ids."""
    _check_length(model, length)
    if given is not None:
        check_positive(vocabulary=given)
        return given, set()
    found = embeddings_of(model, reader, length)
    if not found:
        raise CalibrationError(
            f"no nn.Embedding of {type(model).__name__} reads the token ids, so their number is "
            "not known",
            fix="vocabulary=30522, the number of ids",
        )
    config = getattr(root_of(model), "config", None)
    named = [*(each.padding_idx for each in found), getattr(config, "pad_token_id", None)]
    return min(each.num_embeddings for each in found), {n for n in named if isinstance(n, int)}


def embeddings_of(model: nn.Module, reader: Reader, length: int) -> list[nn.Embedding]:
    """The embeddings that are called with the ids themselves, and not with positions or kinds."""
    device, _ = home_of(model)
    length = max(2, length)
    ids = (torch.arange(1, length + 1, device=device) % 2)[None]  # 1 0 1 0 …: no positions
    found: list[nn.Embedding] = []

    def read(module: nn.Embedding, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        (given, *_) = (*args, *kwargs.values())
        if given.shape == ids.shape and torch.equal(given.long(), ids):
            found.append(module)

    every = [m for m in root_of(model).modules() if isinstance(m, nn.Embedding)]
    hooks = [m.register_forward_pre_hook(read, with_kwargs=True) for m in every]
    try:
        with undisturbed(model) as run, torch.no_grad(), accepted(model, "token ids", ids.shape):
            run(**reader.batch(ids))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _scorer(
    run: Callable[..., Any], reader: Reader, vocabulary: int, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """ids [rows, T] -> logits [rows, T, vocabulary], both on the CPU"""

    def score(ids: Tensor) -> Tensor:
        output = run(**reader.batch(ids.to(device)), **dict.fromkeys(reader.quiet, False))
        logits = _logits(output)
        wanted = (*ids.shape, vocabulary)
        if not isinstance(logits, Tensor) or tuple(logits.shape) != wanted:
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
            raise CalibrationError(
                f"the output has no logits over the vocabulary: {found} instead of {wanted}",
                fix="mpq_fx.synthetic.random_tokens(model, shape)",
            )
        return logits.float().cpu()

    return score


def _logits(output: Any) -> Any:
    if isinstance(output, Mapping):
        return output.get("logits")
    if isinstance(output, (tuple, list)):
        return output[0] if output else None
    return getattr(output, "logits", output)


def _check_first(first: int | None, vocabulary: int) -> None:
    if first is not None and not 0 <= first < vocabulary:
        raise ConfigError(
            f"first={first} is no id of a vocabulary of {vocabulary}", fix="first=None"
        )


def _causal(
    score: Callable[[Tensor], Tensor], length: int, vocabulary: int
) -> Callable[[Tensor], Tensor]:
    """`score`, if another last token changes no earlier logits: what looks ahead cannot write."""
    ids = (torch.arange(max(2, min(length, 8))) % vocabulary)[None]
    other = ids.clone()
    other[0, -1] = (ids[0, -1] + 1) % vocabulary
    one, two = (score(each)[:, :-1] for each in (ids, other))
    if bool((one - two).abs().max() > CAUSAL * one.abs().max()):
        raise CalibrationError(
            "the model looks ahead: logits change with tokens that come later, so it cannot write "
            "a sequence token by token",
            fix="mpq_fx.synthetic.random_tokens(model, shape)",
        )
    return score


def _rows_and_tokens(shape: Sequence[int]) -> tuple[int, int]:
    sizes = sizes_of(shape)
    if len(sizes) != 2:
        raise ConfigError(f"shape={shape} is not (rows, tokens)", fix="shape=(8, 128)")
    return sizes[0], sizes[1]


def _check_length(model: nn.Module, length: int) -> None:
    """Asked before forward is: on a GPU a position out of range ends the process's context."""
    longest = getattr(getattr(root_of(model), "config", None), "max_position_embeddings", None)
    if isinstance(longest, int) and length > longest:
        raise ConfigError(f"{length} tokens are more than the {longest} of the model's config",
                          fix=f"shape=(8, {longest})")  # fmt: skip
