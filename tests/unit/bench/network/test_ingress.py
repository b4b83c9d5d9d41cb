"""Rates and costs of an endpoint, in small: they count what was sent."""

from __future__ import annotations

import pytest

from fedbert_ds.bench.network import ingress
from fedbert_ds.bench.network.endpoint import BYTES_PER_TOKEN


def test_every_rate_is_of_what_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingress, "MESSAGE_BYTES", (40_000,))
    monkeypatch.setattr(ingress, "STREAMS", (1, 3))
    rows = list(ingress.rate_rows(num_bytes=1_200_000))
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
        assert ingress.describe(row)


def test_a_busy_body_is_beside_either() -> None:
    rows = list(ingress.busy_rows(num_bytes=16 << 20))
    assert [row["ingress"] for row in rows] == ["thread", "process"]
    for row in rows:
        assert row["wrong"] == 0 and 0 <= row["blocked_share"] <= 1
        assert ingress.describe(row)
