"""The least time of a window's end, and the work of an exchange that is part of it."""

from __future__ import annotations

import pytest

from fedbert_ds.bench.pipeline import bound
from fedbert_ds.bench.pipeline.bound import ExchangeWork, exchange_work, quickest, window_end_seconds
from fedbert_ds.bench.pipeline.settings import RUN_FILE, Link
from fedbert_ds.run_file import load_config
from fedbert_ds.telemetry.timeline import Shares


class Vocabulary:
    """What `exchange_work` asks of a tokenizer."""

    pad_token_id = 0

    def __len__(self) -> int:
        return 500


@pytest.mark.parametrize(
    ("mode", "staleness", "seconds"), [("synchronous", 0, 0.9), ("synchronous", 1, 0.2), ("parallel", 0, 0.2)]
)
def test_only_exact_synchronous_windows_wait_for_an_exchange(mode: str, staleness: int, seconds: float) -> None:
    spent = Shares(10.0, 4.0, 4.0, 0.1, 0.1, 1.0, 16, activations=0.1, gradient=0.1)
    config = load_config(RUN_FILE, [f"federation.mode={mode}", f"federation.staleness={staleness}"])
    work = ExchangeWork(send=0.02, take=0.04)  # of each of 8 clients, which share a processor
    assert window_end_seconds(spent, config, Link(100.0, 100.0), 5e6, lambda: work) == pytest.approx(seconds)


def test_the_work_of_an_exchange_is_measured() -> None:
    config = load_config(RUN_FILE, ["federation.mode=synchronous", "wire.updates=int8", "model.hidden_size=64"])
    work = exchange_work(config, Vocabulary())
    assert work.send > 0.0 and work.take > 0.0


def test_the_quickest_of_several_tries_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 3.0, 10.0, 12.0, 20.0, 24.0, 30.0, 32.5, 40.0, 49.0])
    monkeypatch.setattr(bound.time, "perf_counter", lambda: next(clock))
    assert quickest(lambda: None) == 2.0
