"""A Welcome, honest or not, as a client reads it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fedbert_ds.client.limits import LARGEST_TOKENIZER, Limits
from fedbert_ds.client.welcome import read_welcome
from fedbert_ds.config import LayersCut, ModelSection, RunConfig
from fedbert_ds.errors import UserError, WireError
from fedbert_ds.model.checkpoint import config_of, config_to_json
from fedbert_ds.run_file import parse_config
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.messages import client_settings, cut_to_json

WORDS = 1000


def welcome_of(config: RunConfig, model: dict[str, Any] | None = None, **fields: Any) -> pb.Welcome:
    """As a server sends it; `model` changes fields of its model's config."""
    settings = client_settings(config.run, config.data, config.optimizer, config.federation, config.wire, tokens=4096)
    model_config = json.loads(config_to_json(config_of(config.model, WORDS, 0)))
    told: dict[str, Any] = {
        "settings": settings.model_dump_json(),
        "cut": cut_to_json(config.cut),
        "model_config": json.dumps(model_config | (model or {})),
        "held_out": 0.1,
        "evaluate_tokens": 512,
    }
    return pb.Welcome(**(told | fields))


LIMITS = Limits(max_tokens=10_000, max_memory=10**9)


def test_an_honest_run_is_read_as_it_is() -> None:
    config = parse_config({"cut": {"layers": 1}, "federation": {"mode": "parallel", "average_every": 3}}, "test")
    asked = read_welcome(welcome_of(config), LIMITS)
    assert asked.cut == LayersCut(layers=1) and asked.held_out == 0.1 and asked.evaluate_tokens == 512
    assert asked.settings.tokens == 4096 and asked.strategy.exchange_after(2) == "weights"
    assert all(parameter.is_meta for parameter in asked.outline.parameters())
    assert asked.least_memory < 10**9


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ({"vocab_size": 10**8}, "vocab_size 100000000; a client takes 4,194,304 at most"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000; a client takes 1,000 at most"),
        ({"hidden_size": 2**40}, "hidden_size"),
        ({"vocab_size": 4_000_000}, r"needs 24\.\d GB of memory here at the least; this client allows 1\.0 GB"),
        ({"id2label": {str(n): f"label {n}" for n in range(70_000)}}, "num_labels 70000; a client takes 65,536"),
    ],
)
def test_a_model_too_large_is_refused_before_it_takes_memory(model: dict[str, Any], reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        read_welcome(welcome_of(parse_config({}, "test"), model), LIMITS)


@pytest.mark.parametrize("share", [1.0, -0.1, float("nan"), float("inf")])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(WireError, match="it must be less than 1"):
        read_welcome(welcome_of(parse_config({}, "test"), held_out=share), LIMITS)


def test_a_vast_tokenizer_is_refused() -> None:
    with pytest.raises(WireError, match="tokenizer has 67,108,865 bytes"):
        read_welcome(welcome_of(parse_config({}, "test"), tokenizer=bytes(LARGEST_TOKENIZER + 1)), LIMITS)


def test_more_tokens_than_the_owner_allows_are_refused() -> None:
    with pytest.raises(WireError, match=r"4,096 tokens of this client in a window; this client allows 4,000"):
        read_welcome(welcome_of(parse_config({}, "test")), Limits(max_tokens=4000))


@pytest.mark.parametrize("fields", [{"model_config": "{}"}, {"settings": "[]"}, {"cut": "none"}])
def test_what_is_not_understood_is_one_line(fields: dict[str, str]) -> None:
    with pytest.raises(UserError) as told:
        read_welcome(welcome_of(parse_config({}, "test"), **fields), LIMITS)
    assert "\n" not in str(told.value)


def test_models_up_to_the_bounds_are_outlined() -> None:
    config = parse_config({"model": ModelSection(num_hidden_layers=4).model_dump(), "cut": "rows"}, "test")
    assert read_welcome(welcome_of(config), LIMITS).outline.widths.activations == config.model.hidden_size
