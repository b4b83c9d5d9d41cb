"""A client update over a link that drops, in small."""

from __future__ import annotations

import pytest

from fedbert_ds.bench.network import transfers
from fedbert_ds.bench.network.transfers import describe, update_row


def test_an_update_over_a_link_that_drops_is_whole_and_not_sent_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "OUTAGE_SECONDS", 0.3)
    row = update_row(30_000_000)
    assert row["cuts"] == 1 and row["is_whole"]
    assert 0 < row["resent_bytes"] < 15_000_000
    assert "sent again" in describe(row)
