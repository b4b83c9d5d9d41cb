"""What the page of reading claims of a rank's network is in the records."""

import json
from pathlib import Path

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"


def rows(name):
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["rows"]


def test_nothing_was_lost_and_a_process_makes_the_body_wait_less():
    assert all(row["wrong"] == 0 for row in rows("ingress"))
    busy = {row["ingress"]: row for row in rows("ingress") if row["what"] == "busy"}
    assert busy["process"]["blocked_seconds_per_gb"] < busy["thread"]["blocked_seconds_per_gb"] / 4


def test_100_mb_take_the_wires_own_time_and_a_half_goes_on_after_a_drop():
    activations = [row for row in rows("transfers") if row["what"] == "activations"]
    assert len(activations) == 5 and all(row["bytes"] == 100_000_000 and row["ratio"] < 1.2 for row in activations)
    (half,) = [row for row in rows("transfers") if row["what"] == "half"]
    assert half["bytes"] == 1_400_000_000 and half["cuts"] == 1 and half["is_whole"]
    assert half["resent_bytes"] < 0.01 * half["bytes"]


def test_256_streams_for_10_minutes():
    last = rows("streams")[-1]
    assert last["streams"] == 256 and last["seconds"] >= 600
    assert last["messages"] == last["answers"] and last["wrong"] == last["wrong_answers"] == 0
    memory = [row["rss_mb"] for row in rows("streams") if row["seconds"] > 60]
    half = len(memory) // 2
    assert abs(sum(memory[half:]) / len(memory[half:]) - sum(memory[:half]) / half) < 10
