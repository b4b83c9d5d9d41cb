"""The benches of endpoints, in small: they count what was sent, and would tell a lost or doubled message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedbert_ds.bench.network import ingress as bench
from fedbert_ds.bench.network.endpoint import BYTES_PER_TOKEN, ClientProcess, Load, MeasuredEndpoint
from fedbert_ds.bench.network.streams import StreamsOptions, bench_streams
from fedbert_ds.bench.network.transfers import describe, half_row


def test_every_rate_is_of_what_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "MESSAGE_BYTES", (40_000,))
    monkeypatch.setattr(bench, "STREAMS", (1, 3))
    rows = list(bench.rate_rows(num_bytes=1_200_000))
    assert [(row["ingress"], row["transport"], row["answered"], row["streams"]) for row in rows] == [
        (place, transport, answered, streams)
        for place in ("thread", "process")
        for answered in (False, True)
        for transport in ("socket", "shared")
        for streams in (1, 3)
    ]
    payload = 40_000 // BYTES_PER_TOKEN * BYTES_PER_TOKEN * 30
    for row in rows:
        assert row["wrong"] == 0
        assert 1 <= row["gb"] * 1e9 / (payload * (1 + row["answered"])) < 1.02, "no more than tags and sizes on top"
        assert bench.describe(row)


def test_a_busy_body_is_beside_either(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(bench.busy_rows(num_bytes=16 << 20))
    assert [row["ingress"] for row in rows] == ["thread", "process"]
    for row in rows:
        assert row["wrong"] == 0 and 0 <= row["blocked_share"] <= 1
        assert bench.describe(row)


def test_a_lost_message_would_be_told() -> None:
    with MeasuredEndpoint(("ada",), answer_bytes=1000) as endpoint, ClientProcess() as clients:
        clients.run(Load(endpoint.address, ("ada",), message_bytes=1000, messages=5))
        assert clients.result().wrong == 0
        clients.run(Load(endpoint.address, ("ada",), message_bytes=1000, messages=5, first=2))
        clients.result()
        assert endpoint.usage().wrong == 5


def test_a_half_over_a_link_that_drops_is_whole_and_not_sent_twice() -> None:
    row = half_row(30_000_000)
    assert row["cuts"] == 1 and row["is_whole"]
    assert 0 < row["resent_bytes"] < 15_000_000
    assert "sent again" in describe(row)


def test_32_streams_for_some_seconds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "streams.json"
    bench_streams(StreamsOptions(out=out, command="fedbert-ds bench streams", streams=32, minutes=5 / 60))
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    last = rows[-1]
    assert last["is_over"] and last["left"] == 32
    assert last["messages"] == last["answers"] > 32 * 8
    assert last["wrong"] == last["wrong_answers"] == 0
    assert "0 lost or doubled" in capsys.readouterr().out
