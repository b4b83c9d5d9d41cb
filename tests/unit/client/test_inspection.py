"""What an owner is told of a run, for every cut and mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from unit.client.test_welcome import LIMITS, WORDS, welcome_of

from fedbert_ds.client.inspection import READS, description
from fedbert_ds.client.welcome import read_welcome
from fedbert_ds.config import ModelSection
from fedbert_ds.model.checkpoint import build_model
from fedbert_ds.model.client_half import ClientHalf
from fedbert_ds.model.cut import split
from fedbert_ds.run_file import parse_config
from fedbert_ds.wire.codecs import decode, encode

WHOLE = {"cut": "whole", "federation": {"mode": "parallel"}}


def told(tree: dict[str, Any], aggregator: str = "", has_tls: bool = False, held_out: float = 0.0) -> str:
    asked = read_welcome(welcome_of(parse_config(tree, "test")), LIMITS)
    return description(asked, "server:1", aggregator, has_tls, held_out)


@pytest.mark.parametrize("cut", ["embeddings", "rows", {"layers": 1}])
def test_what_a_server_gets_of_each_token(cut: Any) -> None:
    lines = told({"cut": cut, "wire": {"activations": "int8", "gradients": "bf16"}, "model": {"hidden_size": 64}})
    assert "of each token: a vector of 64 numbers as int8, 68 bytes" in lines
    assert "of each token to predict: a gradient of 64 numbers as bf16, 128 bytes" in lines
    assert READS[cut if isinstance(cut, str) else "layers"] in lines
    assert ("This server has the word table" in lines) == isinstance(cut, str)
    assert "stays here  text, token ids, labels" in lines


def test_whole_models_send_updates_alone() -> None:
    lines = told(WHOLE)
    assert "of each token" not in lines and READS["whole"] in lines and "the change of weights of" in lines


@pytest.mark.parametrize(
    ("federation", "sentence"),
    [
        ({"mode": "synchronous"}, "every window: the gradients of "),
        ({"mode": "parallel", "average_every": 7}, "every 7 windows: the weights of "),
    ],
)
def test_updates_and_who_gets_them(federation: dict[str, Any], sentence: str) -> None:
    alone, apart = (told({"federation": federation}, aggregator) for aggregator in ("", "other:2"))
    assert sentence in alone and "aggregator" not in alone
    assert "aggregator  other:2, another party" in apart
    assert apart.index("other:2") < apart.index(sentence)
    assert "This server has the word table" in alone and "no part of the word table" in apart
    assert ("negative for exactly the words" in alone) == (federation["mode"] == "synchronous")


@pytest.mark.parametrize("parts", ["kept", "averaged"])
def test_what_becomes_of_a_clients_own_parts(parts: str) -> None:
    lines = told({"federation": {"mode": "parallel", "average_scope": "head", "personal_parts": parts}})
    assert ("whenever a model is written: this client's own embeddings" in lines) == (parts == "averaged")
    assert ("            this client's own embeddings" in lines) == (parts == "kept")


def test_the_way_and_the_held_out_text_are_named() -> None:
    assert "server:1; plain text, which anybody on the way can read" in told({})
    lines = told({}, has_tls=True, held_out=0.25)
    assert "server:1; TLS, certificates on both sides" in lines and "25 % of the articles; of 512 tokens" in lines


# -- what owners are told is so --------------------------------------------------------------------

TOKENS = 64


def half_and_tokens(cut: str) -> tuple[ClientHalf, Tensor]:
    section = ModelSection(hidden_size=32, num_attention_heads=2, dropout=0.0)
    half, _ = split(build_model(section, WORDS, 0, seed=3), cut)
    return half.eval(), torch.randint(5, WORDS, (TOKENS,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("codec", ["fp32", "int8", "int4_hadamard"])
@pytest.mark.parametrize("cut", ["embeddings", "rows"])
@torch.no_grad()
def test_who_has_the_table_reads_every_token_of_what_is_sent(cut: str, codec: str) -> None:
    half, tokens = half_and_tokens(cut)
    sent = half.embed(tokens, [TOKENS])
    seen = decode(encode(sent.values, codec), sent.values.shape, codec, "what the server sees")
    if sent.row_index is not None:
        seen = seen[sent.row_index]
    read = []
    for position in range(TOKENS):
        # Every word in this one's place: what precedes it makes no difference to its vector.
        tried = tokens.repeat(WORDS, 1)
        tried[:, position] = torch.arange(WORDS)
        words = half.embed(tried[:, : position + 1].flatten(), [position + 1] * WORDS)
        values = words.values if words.row_index is None else words.values[words.row_index]
        read.append(int((values[position :: position + 1] - seen[position]).square().sum(dim=1).argmin()))
    assert read == tokens.tolist()


def test_the_gradient_of_the_heads_bias_names_the_masked_words() -> None:
    half, tokens = half_and_tokens("embeddings")
    labels = tokens[:7]
    half.head_backward(torch.randn(7, 32, generator=torch.Generator().manual_seed(2)), labels, 1.0)
    (bias,) = [p.grad for name, p in half.named_parameters() if p.shape == (WORDS,)]
    assert bias is not None and set((bias < 0).nonzero().flatten().tolist()) == set(labels.tolist())
