"""Token ids for models without text: what they are drawn from, and what is passed beside them."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mpq_fx.errors import CalibrationError, ConfigError, MpqError
from mpq_fx.synthetic import random_tokens, sampled
from tests.synthetic.nets import Both, Chain, gpt2


def counted(batches, name: str = "ids", vocabulary: int = 5) -> torch.Tensor:
    """How often each id follows each other one."""
    found = torch.zeros(vocabulary, vocabulary)
    for batch in batches:
        ids = batch[name]
        for before, after in zip(ids[:, :-1].flatten(), ids[:, 1:].flatten(), strict=True):
            found[before, after] += 1
    return found


def chi_square(observed: torch.Tensor, chances: torch.Tensor) -> float:
    """Σ (observed - expected)² / expected, per degree of freedom: about 1 for the right chances."""
    expected = chances * observed.sum(-1, keepdim=True)
    likely = expected > 0
    freedom = int(likely.sum()) - observed.shape[0]
    return float(((observed - expected).square() / expected)[likely].sum()) / freedom


# --- sampled -----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_each_token_follows_the_model_s_own_distribution(temperature):
    model = Chain()
    found = counted(sampled(model, (64, 40), count=2, temperature=temperature))
    right = (model.table.weight / temperature).softmax(1)
    assert chi_square(found, right) < 1.8
    assert chi_square(found, (model.table.weight / (temperature * 1.5)).softmax(1)) > 5


def test_the_first_token_is_uniform_or_the_one_that_was_asked_for():
    model = Chain()
    firsts = torch.cat([b["ids"][:, 0] for b in sampled(model, (200, 2), count=2)])
    assert chi_square(firsts.bincount(minlength=5).float()[None], torch.full((1, 5), 0.2)) < 2.5
    assert all(bool((b["ids"][:, 0] == 3).all()) for b in sampled(model, (4, 3), first=3))


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_of_the_top_k_only_and_among_them_by_their_chances(top_k):
    model = Chain()
    found = counted(sampled(model, (64, 40), count=2, top_k=top_k))
    kept = model.table.weight.topk(top_k).indices
    allowed = torch.zeros(5, 5).scatter(1, kept, 1.0).bool()
    assert not found[~allowed].any()
    if top_k > 1:
        right = model.table.weight.masked_fill(~allowed, -torch.inf).softmax(1)
        assert chi_square(found, right) < 1.8


def test_a_top_k_of_more_than_the_vocabulary_is_all_of_it():
    one, other = sampled(Chain(), (4, 9), top_k=9), sampled(Chain(), (4, 9))
    assert all(torch.equal(a["ids"], b["ids"]) for a, b in zip(one, other, strict=True))


def test_cold_sampling_is_what_transformers_generates_greedily():
    model = gpt2()
    (batch,) = sampled(model, (3, 12), count=1, temperature=1e-6)
    wanted = model.generate(
        batch["input_ids"][:, :1],
        attention_mask=torch.ones(3, 1, dtype=torch.long),
        do_sample=False,
        min_new_tokens=11,
        max_new_tokens=11,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert torch.equal(batch["input_ids"], wanted)
    follows = {(a, b) for row in wanted.tolist() for a, b in pairwise(row)}
    assert len({a for a, _ in follows}) < len(follows), "the last token alone does not tell"
    assert torch.equal(batch["attention_mask"], torch.ones(3, 12, dtype=torch.long))
    assert sorted(batch) == ["attention_mask", "input_ids"]
    with torch.inference_mode():
        assert model(**batch).logits.shape == (3, 12, 61)


def test_padding_is_never_sampled():
    model = Chain()
    model.table.padding_idx = 2
    found = torch.cat([b["ids"][:, 1:].flatten() for b in sampled(model, (16, 30))])
    assert sorted(found.unique().tolist()) == [0, 1, 3, 4]


@pytest.mark.parametrize("make", [sampled, random_tokens])
def test_the_same_seed_gives_the_same_tokens_and_leaves_the_user_s_random_numbers(make):
    model, state = Chain(), torch.get_rng_state()
    one, two, other = (make(model, (3, 6), count=2, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a["ids"], b["ids"]) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0]["ids"], one[1]["ids"])
    assert not torch.equal(one[0]["ids"], other[0]["ids"])


def test_dropout_is_off_while_sampling_and_as_it_was_afterwards():
    class Dropped(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(0.9)

        def forward(self, ids):
            return self.dropout(super().forward(ids))

    model = Dropped().train()
    found, wanted = sampled(model, (4, 9)), sampled(Chain(), (4, 9))
    assert all(torch.equal(a["ids"], b["ids"]) for a, b in zip(found, wanted, strict=True))
    assert [m.training for m in model.modules()] == [True, True, True]


class Wrapped(Chain):
    def __init__(self, wrap) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, ids):
        return self.wrap(super().forward(ids))


@pytest.mark.parametrize(
    "wrap", [lambda y: (y, None), lambda y: {"logits": y}], ids=["tuple", "mapping"]
)
def test_logits_are_found_in_what_forward_returns(wrap):
    found, wanted = sampled(Wrapped(wrap), (2, 5)), sampled(Chain(), (2, 5))
    assert torch.equal(found[0]["ids"], wanted[0]["ids"])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Both(), "the model looks ahead"),
        (Wrapped(lambda y: y[..., :3]), "no logits over the vocabulary: (1, 6, 3) instead of"),
        (Wrapped(lambda y: {"hidden": y}), "no logits over the vocabulary: dict instead of"),
        (Wrapped(lambda y: y * float("nan")), "logits hold NaN"),
    ],
)
def test_what_is_no_causal_language_model_is_refused(model, message):
    with pytest.raises(CalibrationError) as caught:
        sampled(model, (2, 6), count=1)
    assert message in caught.value.what
    assert caught.value.fix


def test_an_encoder_with_a_decoder_is_given_both_sequences_and_writes_none():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(vocab_size=40, **sizes)).eval()
    (batch,) = random_tokens(model, (2, 7), count=1)
    assert sorted(batch) == ["attention_mask", "decoder_input_ids", "input_ids"]
    assert not torch.equal(batch["input_ids"], batch["decoder_input_ids"])
    with pytest.raises(CalibrationError, match="reads one sequence and writes another"):
        sampled(model, (2, 7))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"top_k": 0}, "top_k=0 must be above 0"),
        ({"count": 0}, "count=0 must be above 0"),
        ({"first": 5}, "first=5 is no id of a vocabulary of 5"),
        ({"vocabulary": 0}, "vocabulary=0 must be above 0"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options, message):
    with pytest.raises(ConfigError) as caught:
        sampled(Chain(), (2, 4), **options)
    assert caught.value.what == message


# --- random ------------------------------------------------------------------------------------


def test_ids_are_uniform_over_the_vocabulary_of_the_embedding_that_reads_them():
    batches = random_tokens(Both(), (64, 8), count=8)
    ids = torch.cat([b["tokens"].flatten() for b in batches])
    observed = ids.bincount(minlength=11).float()
    assert observed[3] == 0, "3 is padding"
    chances = torch.full((1, 11), 0.1)
    chances[0, 3] = 0
    assert chi_square(observed[None], chances) < 2.2
    assert batches[0].origin.facts == {"seed": 0, "vocabulary": 11}


def test_masks_and_kinds_that_forward_needs_are_passed():
    (batch,) = random_tokens(Both(), (2, 8), count=1)
    assert list(batch) == ["tokens", "mask", "token_type_ids"]
    assert bool((batch["mask"] == 1).all())
    assert bool((batch["token_type_ids"] == 0).all())
    assert Both()(**batch).shape == (2, 8, 11)


def test_special_ids_of_a_config_are_kept_away_from():
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=12, intermediate_size=16, sep_token_id=4, **sizes)
    config.eos_token_id = [5, 6]
    model = BertModel(config).eval()
    (batch,) = random_tokens(model, (16, 16), count=1)
    assert sorted(batch["input_ids"].unique().tolist()) == [1, 2, 3, 7, 8, 9, 10, 11]
    assert "token_type_ids" not in batch, "BERT does not need it"


def test_a_vocabulary_that_no_embedding_tells_is_given():
    class OneHot(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, ids):
            return self.linear(nn.functional.one_hot(ids, 6).float())

    with pytest.raises(CalibrationError, match=r"no nn\.Embedding of OneHot reads") as caught:
        random_tokens(OneHot(), (2, 4))
    assert "vocabulary=" in caught.value.fix
    (batch,) = random_tokens(OneHot(), (32, 8), vocabulary=6, count=1)
    assert sorted(batch["ids"].unique().tolist()) == [*range(6)]
    assert sampled(OneHot(), (2, 4), vocabulary=6)[0]["ids"].shape == (2, 4)


def test_of_two_embeddings_that_read_the_ids_the_smaller_bounds_them():
    class Two(Chain):
        def __init__(self) -> None:
            super().__init__(9)
            self.coarse = nn.Embedding(4, 9)

        def forward(self, ids):
            return super().forward(ids) + self.coarse(ids)

    (batch,) = random_tokens(Two(), (64, 4), count=1)
    assert sorted(batch["ids"].unique().tolist()) == [0, 1, 2, 3]


class Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.conv(x)


class Needs(Chain):
    def forward(self, ids, pixels):
        return super().forward(ids)


class Unnamed(Chain):
    def forward(self, *args):
        return super().forward(*args)


@pytest.mark.parametrize(
    ("model", "shape", "kind", "message"),
    [
        (Image(), (2, 4), CalibrationError, "Image refuses token ids of shape (1, 4): "),
        (Both(), (2, 17), CalibrationError, "refuses token ids of shape (1, 17): index out of"),
        (Needs(), (2, 4), ConfigError, "Needs.forward needs pixels, which token ids do not tell"),
        (Unnamed(), (2, 4), ConfigError, "Unnamed.forward has no named input"),
        (Chain(), (2, 4, 4), ConfigError, "is not (rows, tokens)"),
        (Chain(), (0, 4), ConfigError, "is not the size of a batch"),
    ],
)
@pytest.mark.parametrize("make", [sampled, random_tokens])
def test_a_model_that_takes_no_tokens_says_why_and_what_to_do(make, model, shape, kind, message):
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    with pytest.raises(MpqError) as caught:
        make(model, shape)
    assert type(caught.value) is kind
    assert message in caught.value.what
    assert caught.value.fix
    assert hooks == [len(m._forward_pre_hooks) for m in model.modules()]


def test_more_tokens_than_the_config_has_positions_for_are_refused_before_the_model_runs():
    with pytest.raises(ConfigError, match="25 tokens are more than the 24 of the model's config"):
        random_tokens(gpt2(), (2, 25))


def test_a_vocabulary_of_special_ids_only_is_refused():
    model = Chain(2)
    model.table.padding_idx, model.config = 0, SimpleNamespace(eos_token_id=1)
    with pytest.raises(CalibrationError, match="all 2 ids of the vocabulary are special"):
        random_tokens(model, (2, 2))


@pytest.mark.parametrize("make", [sampled, random_tokens])
def test_a_compiled_model_is_run_as_it_is_and_nothing_compiled(isolated, make):
    model, graphs = Chain(), []
    wanted = make(model, (2, 4), count=1)
    model.compile(backend=lambda gm, inputs: graphs.append(gm) or gm.forward)
    assert torch.equal(make(model, (2, 4), count=1)[0]["ids"], wanted[0]["ids"])
    assert not graphs


@pytest.mark.gpu
@pytest.mark.parametrize("make", [sampled, random_tokens])
def test_a_model_on_a_gpu_gets_the_same_tokens_there(make):
    (batch,) = make(Chain().cuda(), (4, 6), count=1)
    assert batch["ids"].is_cuda
    assert torch.equal(batch["ids"].cpu(), make(Chain(), (4, 6), count=1)[0]["ids"])
