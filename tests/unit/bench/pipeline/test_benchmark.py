"""What `bench pipeline` runs and what it tells; the runs themselves are tried by its own --quick."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedbert_ds.bench.pipeline import exchange
from fedbert_ds.bench.pipeline.benchmark import (
    CEILING,
    KEPT,
    RUN_FILE,
    Link,
    PipelineOptions,
    Setting,
    settings,
)
from fedbert_ds.bench.pipeline.benchmark import _bubble as bubble
from fedbert_ds.bench.pipeline.benchmark import _overrides as overrides
from fedbert_ds.bench.pipeline.exchange import ExchangeWork, exchange_work
from fedbert_ds.bench.pipeline.report import draw, sentence, table
from fedbert_ds.bench.pipeline.timeline import Shares
from fedbert_ds.config import load_config


class Vocabulary:
    """What `exchange_work` asks of a tokenizer."""

    pad_token_id = 0

    def __len__(self) -> int:
        return 500


OPTIONS = PipelineOptions(Path("out.json"), "fedbert-ds bench pipeline")


def row(system: str, speed: float, rtt: float = 50.0, **more) -> dict:
    return {
        "system": system,
        "variant": "",
        "rtt_ms": rtt,
        "mbit": 100.0,
        "utilization": 0.9,
        "utilization_bound": 0.95,
        "tokens_per_second": speed,
        "bytes_per_token_up": 100.0,
        "bytes_per_token_down": 120.0,
        "dummy_share": 0.0,
    } | more


def test_every_link_has_ours_and_naive_and_there_is_one_ceiling() -> None:
    made = list(settings(OPTIONS))
    assert [s.link for s in made if s.variant == CEILING] == [Link()]
    for rtt in OPTIONS.rtt_ms:
        link = Link(rtt, 100.0 if rtt else None)
        assert [s.variant for s in made if s.link == link and s.system == "naive"] == ["", KEPT]
        compared = [s.system for s in made if s.link == link and not s.variant]
        assert compared == ["centralized", "ours", "centralized", "naive"]
        assert len([s for s in made if s.link == link and s.system == "ours"]) == 4
    different = [setting for setting in made if setting.system != "centralized"]
    assert len({setting.slug for setting in different}) == len(different)


def test_quick_is_one_of_each() -> None:
    quick = PipelineOptions(Path("out.json"), "", quick=True, rtt_ms=(50.0, 200.0))
    assert [setting.system for setting in settings(quick)] == ["centralized", "ours", "naive"]


@pytest.mark.parametrize("quick", [False, True])
def test_every_setting_is_a_run_file_that_loads(quick: bool) -> None:
    options = PipelineOptions(Path("out.json"), "", quick=quick, clients=3)
    for setting in settings(options):
        config = load_config(RUN_FILE, [*overrides(options, setting), "tokenizer.path=somewhere"])
        assert config.clients.expected == 3 and config.clients.local == 0
        assert config.run.trace, "bounds are read from the timeline"


def test_ratios_are_of_the_same_link() -> None:
    rows = [
        row("centralized", 1000.0),
        row("ours", 900.0),
        row("naive", 90.0),
        row("ours", 800.0, 200.0),
    ]
    lines = table(rows).splitlines()
    assert "| 90 % | 10.0 |" in lines[3]
    assert "| 800 |  |  |" in lines[5], "nothing to compare with over that link"
    assert "220 bytes/token" in sentence(rows[1])


def test_what_is_measured_before_and_after_counts_with_its_mean() -> None:
    rows = [row("centralized", 900.0), row("ours", 950.0), row("centralized", 1100.0)]
    assert "| 95 % |" in table(rows).splitlines()[3]


def test_picture(tmp_path: Path) -> None:
    draw(tmp_path / "p.png", [row("centralized", 1000.0, rtt=0.0), row("ours", 900.0), row("naive", 90.0)])
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_an_exchange_takes_a_round_trip_and_both_ways() -> None:
    assert Link(50.0, 100.0).seconds(2.5e6) == pytest.approx(0.05 + 0.2)
    assert Link(50.0).seconds(2.5e6) == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("mode", "staleness", "seconds"), [("synchronous", 0, 0.9), ("synchronous", 1, 0.2), ("parallel", 0, 0.2)]
)
def test_only_exact_synchronous_windows_wait_for_halves(mode: str, staleness: int, seconds: float) -> None:
    spent = Shares(10.0, 4.0, 4.0, 0.1, 0.1, 1.0, 16, activations=0.1, gradient=0.1)
    config = load_config(RUN_FILE, [f"federation.mode={mode}", f"federation.staleness={staleness}"])
    work = ExchangeWork(send=0.02, take=0.04)  # of each of 8 clients, which share a processor
    assert bubble(spent, config, Link(100.0, 100.0), 5e6, lambda: work) == pytest.approx(seconds)


def test_the_work_of_an_exchange_is_measured() -> None:
    config = load_config(RUN_FILE, ["federation.mode=synchronous", "wire.updates=int8", "model.hidden_size=64"])
    work = exchange_work(config, Vocabulary())
    assert work.send > 0.0 and work.take > 0.0


def test_the_quickest_of_several_tries_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 3.0, 10.0, 12.0, 20.0, 24.0, 30.0, 32.5, 40.0, 49.0])
    monkeypatch.setattr(exchange.time, "perf_counter", lambda: next(clock))
    assert exchange._quickest(lambda: None) == 2.0


def test_names() -> None:
    assert Link(50.0, 100.0).name == "50ms-100mbit" and Link().name == "0ms"
    assert Setting("ours", Link(50.0, 100.0), "fp32 embeddings").slug == "ours-50ms-100mbit-fp32-embeddings"
