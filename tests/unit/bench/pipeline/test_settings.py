"""What `bench pipeline` runs, and in which order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fedbert_ds.bench.pipeline.settings import (
    BODY_ALONE,
    RUN_FILE,
    Baseline,
    Link,
    PipelineOptions,
    Run,
    Setting,
    settings,
)
from fedbert_ds.run_file import load_config

OPTIONS = PipelineOptions(Path("out.json"), "fedbert-ds bench pipeline")
QUICK = replace(OPTIONS, quick=True, rtt_ms=(50.0, 200.0))
OTHER = Baseline("other", ("", "kinder"), lambda run: {})


def test_every_link_has_ours_between_two_centralized_and_there_is_one_ceiling() -> None:
    made = list(settings(OPTIONS))
    assert [s.link for s in made if s.variant == BODY_ALONE] == [Link()]
    for rtt in OPTIONS.rtt_ms:
        link = Link(rtt, 100.0 if rtt else None)
        compared = [s.system for s in made if s.link == link and not s.variant]
        assert compared == ["centralized", "ours", "centralized"]
        assert len([s for s in made if s.link == link and s.system == "ours"]) == 4
    ours = [setting for setting in made if setting.system == "ours"]
    assert len({setting.slug for setting in ours}) == len(ours)


def test_a_baseline_runs_with_all_its_variants_over_every_link_after_ours() -> None:
    made = [setting for setting in settings(OPTIONS, [OTHER]) if setting.link == Link(50.0, 100.0)]
    assert [(s.system, s.variant) for s in made][-2:] == [("other", ""), ("other", "kinder")]


def test_quick_is_one_of_each() -> None:
    assert [setting.system for setting in settings(QUICK)] == ["centralized", "ours"]
    assert [setting.system for setting in settings(QUICK, [OTHER])] == ["centralized", "ours", "other"]


def test_only_what_is_asked_for() -> None:
    assert {s.system for s in settings(replace(OPTIONS, only=("ours", "other")), [OTHER])} == {"ours", "other"}
    assert {s.system for s in settings(replace(OPTIONS, only=("other",)))} == set(), "no such baseline here"


@pytest.mark.parametrize("options", [OPTIONS, QUICK], ids=["full", "quick"])
def test_every_setting_is_a_run_file_that_loads(options: PipelineOptions) -> None:
    for setting in settings(replace(options, clients=3)):
        config = load_config(RUN_FILE, replace(options, clients=3).overrides_of(setting))
        assert config.clients.expected == 3 and config.clients.local == 0
        assert config.run.trace, "bounds are read from the timeline"


def test_a_row_says_what_ran_and_what_it_reached() -> None:
    setting = Setting("other", Link(50.0, 100.0), overrides=("cut=embeddings",))
    row = Run(setting, OPTIONS, Path("shards"), Path("tokenizer")).row(1000.0, 0.75, codec="fp32, padded")
    expected = {"system": "other", "rtt_ms": 50.0, "mbit": 100.0, "cut": "embeddings", "codec": "fp32, padded"}
    assert row | expected == row
    assert (row["tokens_per_second"], row["utilization"], row["bubble_share"]) == (1000.0, 0.75, 0.25)


def test_an_exchange_takes_a_round_trip_and_both_ways() -> None:
    assert Link(50.0, 100.0).seconds(2.5e6) == pytest.approx(0.05 + 0.2)
    assert Link(50.0).seconds(2.5e6) == pytest.approx(0.05)


def test_names() -> None:
    assert Link(50.0, 100.0).name == "50ms-100mbit" and Link().name == "0ms"
    assert Setting("ours", Link(50.0, 100.0), "fp32 embeddings").slug == "ours-50ms-100mbit-fp32-embeddings"
