"""Many streams at one endpoint, for some seconds."""

from __future__ import annotations

from fedbert_ds.bench.network.streams import describe, stream_rows


def test_32_streams_lose_and_double_nothing() -> None:
    rows = list(stream_rows(streams=32, seconds=2.5))
    last = rows[-1]
    assert [row["is_over"] for row in rows] == [False] * (len(rows) - 1) + [True]
    assert last["left"] == 32
    assert last["messages"] == last["answers"] > 32 * 8
    assert last["wrong"] == last["wrong_answers"] == 0
    assert "0 lost or doubled" in describe(last)


def test_a_line_a_minute() -> None:
    row = {"streams": 1, "messages": 7, "wrong": 0, "rss_mb": 1.0, "is_over": False}
    said = [seconds for seconds in range(0, 121, 5) if describe(row | {"seconds": seconds})]
    assert said == [0, 60, 120]
