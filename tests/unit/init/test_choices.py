"""What is chosen for a run: ways that are preferred, windows that are small, what follows from
hours.
"""

from __future__ import annotations

from typing import Any

import pytest

from fedbert_ds.config import RunConfig
from fedbert_ds.errors import ConfigError
from fedbert_ds.init.choices import BERTS_WINDOW, Wanted, choose


def always(rate: float) -> Any:
    return lambda config: rate


def needing_large_windows(config: RunConfig) -> float:
    """Only a million tokens keep such a body busy."""
    return 1e5 * min(1.0, config.window.tokens / (1 << 20))


@pytest.mark.parametrize(
    ("slow", "mode", "cut"),
    [
        ([], "synchronous", "embeddings"),
        ([("synchronous", "embeddings")], "synchronous", "rows"),
        ([("synchronous", "embeddings"), ("synchronous", "rows")], "parallel", "embeddings"),
    ],
    ids=str,
)
def test_the_first_way_that_is_fast_enough_is_taken(slow: Any, mode: str, cut: str) -> None:
    def speed(config: RunConfig) -> float:
        return 1e4 if (config.federation.mode, config.cut) in slow else 1e5

    choice = choose(Wanted(), speed)
    assert (choice.config.federation.mode, choice.config.cut) == (mode, cut)
    assert "synchronous with cut embeddings" in choice.reasons["federation.mode"]


def test_a_window_is_as_small_as_the_body_s_speed_allows() -> None:
    assert choose(Wanted(hours=1000), always(1e5)).config.window.tokens == BERTS_WINDOW
    assert choose(Wanted(hours=1000), needing_large_windows).config.window.tokens == 1 << 20
    # A budget of 3.6 million tokens: a thousand steps, and not 27 of BERT's.
    short = choose(Wanted(hours=0.1), always(1e4)).config
    assert short.window.tokens == 4096 and short.run.windows == round(1e4 * 360 / 4096)


def test_windows_follow_from_hours_and_all_else_from_windows() -> None:
    config = choose(Wanted(hours=24), always(1e5)).config
    assert config.run.windows == round(1e5 * 24 * 3600 / BERTS_WINDOW)
    assert config.run.save_every == round(config.run.windows / 48)
    assert config.run.evaluate_every == config.run.windows // 20
    assert config.optimizer.warmup_windows == config.run.windows // 20
    longer = choose(Wanted(hours=96), always(1e5)).config
    assert longer.optimizer.lr == pytest.approx(config.optimizer.lr / 2, rel=0.05), "square root of the steps"


@pytest.mark.parametrize("clients", [1, 3, 64, 3000])
@pytest.mark.parametrize("gpus", [0, 1, 8])
def test_every_client_has_room_in_a_window_and_fills_a_micro_batch(clients: int, gpus: int) -> None:
    config = choose(Wanted(clients=clients, gpus=gpus, hours=1), always(1e4)).config
    window = config.window
    assert window.tokens >= clients * config.data.sequence_length
    assert window.tokens_per_micro_batch * max(1, gpus) <= window.tokens
    part = window.tokens / clients
    assert window.clients_per_micro_batch * part >= window.tokens_per_micro_batch
    assert config.clients.expected == clients and 1 <= config.clients.required <= clients


def test_owners_elsewhere_need_certificates_and_a_name() -> None:
    choice = choose(Wanted(host="gpu.example", gpus=8), always(1e5))
    server = choice.config.server
    assert server.tls is not None and str(server.tls.certificate) == "certs/gpu.example.pem"
    assert server.advertise == "gpu.example" and "29600 to 29607" in choice.reasons["server.port"]
    decided = {name for name, reason in choice.reasons.items() if reason.startswith("DECIDE: ")}
    assert decided == {"tokenizer.path", "server.advertise", "server.tls.ca"}
    assert choice.config.clients.local == 0 and choice.config.wire.activations == "int8"


def test_a_try_on_this_machine_needs_nothing_else() -> None:
    choice = choose(Wanted(size="tiny", clients=2, gpus=0, data=("notes",)), always(1e4))
    config = choice.config
    assert config.clients.local == 2 and config.data.source == ("notes",) and config.server.tls is None
    assert config.wire.activations == "fp32" and config.federation.mode == "synchronous"
    assert (config.body.precision, config.tokenizer.path) == ("fp32", None)
    assert not [reason for reason in choice.reasons.values() if reason.startswith("DECIDE: ")]


def test_a_tokenizer_that_is_named_is_not_left_to_decide() -> None:
    choice = choose(Wanted(tokenizer="camembert-base"), always(1e5))
    assert choice.config.tokenizer.path == "camembert-base" and "tokenizer.path" not in choice.reasons


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (Wanted(size="huge"), "--size huge: choose tiny, mini"),
        (Wanted(gpus=-1), "--gpus -1"),
        (Wanted(clients=0), "--clients 0: at least 1"),
        (Wanted(hours=0.0), "--hours 0.0"),
        (Wanted(hours=float("nan")), "--hours nan"),
    ],
    ids=str,
)
def test_numbers_that_make_no_run_are_one_line(wanted: Wanted, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        choose(wanted, always(1e5))


def test_hours_that_are_too_few_are_told() -> None:
    assert "few for a model" not in choose(Wanted(hours=100), always(1e5)).reasons["run.windows"]
    assert "few for a model" in choose(Wanted(hours=0.01), always(1e5)).reasons["run.windows"]
