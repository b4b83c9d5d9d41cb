"""Plans for run files: sizes and bytes that are known, and words that fit the figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedbert_ds.config import load_config
from fedbert_ds.planner.derive import COMPRESSED, Machines, derive, distinct_rows
from fedbert_ds.planner.plan import as_row, bottleneck, draw, predict, report, sweep, whole_model
from fedbert_ds.planner.simulation import Outcome, WindowResult
from fedbert_ds.wire.codecs import NAMES, encode

CONFIGS = Path(__file__).parents[3] / "configs"
SMALL = ("window.tokens=65536", "window.tokens_per_micro_batch=4096")


def config(*overrides: str):
    return load_config(CONFIGS / "bert-base.yaml", overrides)


def test_sizes_of_bert_base():
    scenario, model = derive(config(), Machines())
    assert model.body_parameters == pytest.approx(85.1e6, rel=0.01)  # 12 layers
    assert model.half_parameters == pytest.approx(24.1e6, rel=0.01)  # word table 23.4 M, head transform 0.6 M
    assert model.body_flops == pytest.approx(6 * 85e6, rel=0.08)
    assert scenario.wire.update == 4 * model.half_parameters


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        # 768 int8 and a 4-byte scale, up and down; 15 % of that twice; a bit for the mask.
        (["wire.activations=int8", "wire.gradients=int8", "wire.compression=none"], 2 * 772 * 1.15),
        (["wire.activations=fp32", "wire.gradients=fp32", "wire.compression=none"], 2 * 3072 * 1.15),
        (["wire.activations=int8", "wire.gradients=int8"], 2 * 772 * 1.15 * COMPRESSED["int8"]),
    ],
)
def test_bytes_a_token(overrides, expected):
    scenario, _ = derive(config("cut=embeddings", *overrides), Machines())
    assert scenario.wire.up + scenario.wire.down == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("codec", NAMES)
def test_what_compression_leaves_is_about_what_it_leaves_of_normal_numbers(codec):
    values = torch.randn(400, 768, generator=torch.Generator().manual_seed(1))
    plain, small = (encode(values, codec, compressed=compressed).ByteSize() for compressed in (False, True))
    assert COMPRESSED[codec] == pytest.approx(small / plain, abs=0.02)


def test_rows_are_cheaper_in_large_messages():
    wires = [derive(config(f"window.tokens_per_micro_batch={n}"), Machines())[0].wire for n in (512, 16384)]
    assert wires[1].up + wires[1].down < 0.65 * (wires[0].up + wires[0].down)
    assert distinct_rows(512) == pytest.approx(218, rel=0.02) and distinct_rows(16384) == pytest.approx(3046, rel=0.02)


def test_more_gpus_are_faster_until_clients_are_too_few():
    fast = Machines(clients=64, client_flops=1e14, rtt=0.0, up=1e12, down=1e12)
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


def test_bottleneck_is_what_is_busiest():
    def outcome(busy, client, link):
        return Outcome([WindowResult(1.0, 1, busy, 0, 1, 1)], client, link, 0.0)

    assert bottleneck(outcome(0.95, 1.0, 1.0)) == "body"
    assert bottleneck(outcome(0.5, 0.8, 0.9)) == "network"
    assert bottleneck(outcome(0.5, 0.8, 0.1)) == "clients"
    assert bottleneck(outcome(0.5, 0.1, 0.1)) == "flush"


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
