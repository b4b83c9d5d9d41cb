"""Plans for run files: the bottleneck is named, and words fit the figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fedbert_ds.planner.derive import Machines, derive
from fedbert_ds.planner.plan import as_row, bottleneck, draw, predict, report, sweep, whole_model
from fedbert_ds.planner.simulation import Outcome, WindowResult
from fedbert_ds.run_file import load_config

CONFIGS = Path(__file__).parents[3] / "configs"
SMALL = ("window.tokens=65536", "window.tokens_per_micro_batch=4096")


def config(*overrides: str):
    return load_config(CONFIGS / "bert-base.yaml", overrides)


def test_more_gpus_are_faster_until_clients_are_too_few():
    fast = Machines(clients=64, client_flops=1e14, rtt=0.0, up=1e12, down=1e12, launch_per_layer=0.0, codec_cores=64.0)
    one = predict(config(), fast, 1e9)
    four = predict(config(), replace(fast, gpus=4), 1e9)
    assert 2.5 < four.tokens_per_second / one.tokens_per_second < 4.0
    assert one.bottleneck == "body"
    assert one.days == pytest.approx(1e9 / one.tokens_per_second / 86400)
    assert one.cost == pytest.approx(one.days * 24 * 2.5)


def test_slow_links_are_named():
    assert (
        predict(config(*SMALL), Machines(clients=4, client_flops=1e14, up=1e5, down=1e5), 1e9).bottleneck == "network"
    )


def test_slow_clients_are_named():
    slow = Machines(clients=4, client_flops=1e9, up=1e12, down=1e12, rtt=0.0)
    assert predict(config(*SMALL), slow, 1e9).bottleneck == "clients"


def test_a_host_that_launches_slowly_is_named_and_larger_micro_batches_help():
    near = Machines(clients=64, client_flops=1e14, rtt=0.0, up=1e12, down=1e12, launch_per_layer=2e-2)
    slow = predict(config("window.tokens_per_micro_batch=8192"), near, 1e9)
    assert slow.bottleneck == "host" and slow.busy_share < 0.5 < slow.launching_share
    larger = predict(config("window.tokens_per_micro_batch=32768"), near, 1e9)
    assert larger.tokens_per_second > 1.5 * slow.tokens_per_second
    quick = predict(config("window.tokens_per_micro_batch=8192"), replace(near, launch_per_layer=0.0), 1e9)
    assert quick.launching_share == 0.0 and quick.bottleneck == "body"


def test_a_rank_whose_codecs_cannot_keep_up_is_named():
    near = Machines(clients=64, client_flops=1e14, rtt=0.0, up=1e12, down=1e12, codec_cores=0.5, launch_per_layer=0.0)
    assert predict(config(), near, 1e9).bottleneck == "server"
    assert predict(config(), replace(near, codec_cores=64.0), 1e9).bottleneck == "body"


def test_bottleneck_is_what_is_busiest():
    def outcome(busy, client, link):
        return Outcome([WindowResult(1.0, 1, busy, 0, 1, 1)], client, link, 0.0)

    assert bottleneck(outcome(0.95, 1.0, 1.0)) == "body"
    assert bottleneck(outcome(0.5, 0.8, 0.9)) == "network"
    assert bottleneck(outcome(0.5, 0.8, 0.1)) == "clients"
    assert bottleneck(outcome(0.5, 0.1, 0.1)) == "flush"
    few = Outcome([WindowResult(1.0, 1, 0.5, 0, 1, in_flight=3, wanted_in_flight=4)], 0.1, 0.1, 0.0)
    assert bottleneck(few) == "memory"


def test_slow_answers_need_more_in_flight_than_memory_holds():
    """Round trips of half a second, as GPU nodes see from clients far away."""
    far = Machines(clients=64, client_flops=1e13, rtt=0.5, up=1e12, down=1e12)
    little, words = report(config(), replace(far, gpu_memory=16e9), 1e9)
    assert little.in_flight == little.affordable_in_flight < little.wanted_in_flight
    assert little.bottleneck == "memory" and f"answers need {little.wanted_in_flight}" in words
    much = predict(config(), replace(far, gpu_memory=1e12), 1e9)
    assert much.in_flight == much.wanted_in_flight > little.in_flight
    assert much.tokens_per_second > little.tokens_per_second


def test_whole_model_averaging_of_bert_base_costs_what_the_field_says():
    """109.5 M parameters, fp32 both ways, every 512 steps of 16 k tokens: 105 bytes a token."""
    machines = Machines(clients=64)
    settings = config(f"window.tokens={64 * 16384}")
    _, model = derive(settings, machines)
    assert whole_model(settings, machines, model).bytes_per_token == pytest.approx(105, rel=0.02)


def test_report_says_it_in_words():
    plan, text = report(config(*SMALL), Machines(clients=8), 1e9)
    assert replace(plan, coordinator_seconds=0.0) == replace(
        predict(config(*SMALL), Machines(clients=8), 1e9), coordinator_seconds=0.0
    ), "the same clock, the same plan; but for what the machine itself took"
    for word in ("tokens/s", "body busy", "bytes a token", "days", "GPU hour", "whole models averaged"):
        assert word in text


def test_curves(tmp_path: Path):
    rows = []
    for prediction in sweep(config("window.tokens_per_micro_batch=16384"), Machines(clients=16), 1e9, 4096):
        rows.append(as_row(prediction))
        if prediction.clients >= 100:
            break
    assert [row["clients"] for row in rows] == [10, 30, 100]
    draw(tmp_path / "sweep.png", rows)
    assert (tmp_path / "sweep.png").stat().st_size > 1000
