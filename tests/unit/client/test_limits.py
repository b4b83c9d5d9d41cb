"""What a client's owner allows, against runs that ask for more."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from unit.client.one_client import settings_of

from fedbert_ds.client import limits
from fedbert_ds.client.limits import Limits, check_memory, check_model, check_peak, check_settings, least_memory
from fedbert_ds.config import LayersCut, ModelSection, OptimizerSection, SequenceSection
from fedbert_ds.errors import WireError
from fedbert_ds.model.checkpoint import config_of
from fedbert_ds.wire.messages import ClientSettings

LIMITS = Limits(max_tokens=1000, max_memory=10**9)


def with_sequences(**changes: Any) -> ClientSettings:
    return settings_of(sequences=SequenceSection(**({"sequence_length": 8, "mask_probability": 0.4} | changes)))


@pytest.mark.parametrize(
    ("settings", "evaluate_tokens", "reason"),
    [
        (settings_of(tokens=10**10), 0, "10,000,000,000 tokens of this client in a window; this client allows 1,000"),
        (settings_of(tokens=-1), 0, "-1 tokens of this client in a window"),
        (settings_of(tokens_per_micro_batch=1001), 0, "1,001 tokens in a micro-batch"),
        (settings_of(), 1 << 63, "tokens in an evaluation"),
        (with_sequences(sequence_length=1 << 20), 0, "sequences of 1,048,576 tokens; a client takes 65,536 at most"),
        (with_sequences(mask_probability=0.99), 0, "the run predicts 99 % of all tokens; a client takes 50% at most"),
    ],
)
def test_settings_out_of_bounds_are_refused(settings: ClientSettings, evaluate_tokens: int, reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        check_settings(settings, evaluate_tokens, LIMITS)


def test_what_the_owner_allows_is_not_refused() -> None:
    check_settings(settings_of(tokens=1000, tokens_per_micro_batch=1000), 1000, LIMITS)


@pytest.mark.parametrize(
    "field",
    [
        "vocab_size",
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "hidden_dim",
        "max_position_embeddings",
        "num_labels",
    ],
)
@pytest.mark.parametrize("value", [10**9, -1, "many", None])
def test_a_model_of_no_sane_run_is_refused_before_it_is_built(field: str, value: Any) -> None:
    with pytest.raises(WireError, match=f"the run's model has {field} {value}; a client takes"):
        check_model(SimpleNamespace(**{field: value}))


def test_models_that_people_train_are_not_refused() -> None:
    check_model(config_of(ModelSection(num_hidden_layers=48, hidden_size=8192, num_attention_heads=64), 256_000, 0))


def test_least_memory_counts_half_optimizer_and_one_piece() -> None:
    model = config_of(ModelSection(num_hidden_layers=3, hidden_size=128), 1000, 0)
    settings = settings_of(tokens=100, tokens_per_micro_batch=600, optimizer=OptimizerSection(name="adamw"))
    base = least_memory(0, model, "embeddings", settings)
    assert least_memory(10**6, model, "embeddings", settings) == base + 16 * 10**6
    plain = settings_of(tokens=100, tokens_per_micro_batch=600, optimizer=OptimizerSection(name="sgd"))
    assert least_memory(10**6, model, "embeddings", plain) == base + 8 * 10**6
    tensor = 100 * 4 * 128
    assert base == limits.PROCESS_BYTES + 2 * tensor + 2 * 4 * 100 * 1000
    assert least_memory(0, model, LayersCut(layers=2), settings) == base + 2 * 8 * tensor
    assert least_memory(0, model, "whole", settings) == base + 3 * 8 * tensor


def test_memory_over_the_owners_limit_is_refused() -> None:
    check_memory(10**9, LIMITS)
    check_peak(10**9, LIMITS)
    with pytest.raises(WireError, match=r"needs 1\.1 GB of memory here at the least; this client allows 1\.0 GB"):
        check_memory(1_100_000_000, LIMITS)
    with pytest.raises(WireError, match=r"has held 1\.1 GB of memory, over 1\.0 GB \(--max-memory\); it leaves"):
        check_peak(1_100_000_000, LIMITS)


def test_by_default_a_client_takes_no_more_than_a_part_of_the_machine() -> None:
    machine = limits.most_of_this_machine() / limits.SHARE_OF_MACHINE
    assert 2**28 < machine < 2**50 and Limits().max_memory == limits.most_of_this_machine()
