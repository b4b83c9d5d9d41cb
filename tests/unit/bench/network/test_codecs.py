"""`bench network --what codecs`: rows of both cuts and ways, with bytes that can be worked out."""

from __future__ import annotations

import pytest

from fedbert_ds.bench.network import codecs
from fedbert_ds.bench.network.codecs import codec_rows, describe


def test_a_row_for_each_cut_and_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs, "PIECE_TOKENS", 40)
    rows = list(codec_rows(is_quick=True))
    ways = ("values", "codes")
    assert [(row["cut"], row["way"]) for row in rows] == [(cut, way) for cut in ("embeddings", "rows") for way in ways]
    embeddings, by_rows = rows[0], rows[2]
    # 40 tokens and 6 masked ones, both ways, of 772 bytes each before compression.
    uncompressed = 2 * 46 * 772 / 40
    assert 0.85 * uncompressed < embeddings["bytes_per_token"] < uncompressed
    assert by_rows["bytes_per_token"] < embeddings["bytes_per_token"]
    for row in rows:
        assert row["tokens_per_second"] > 0 and row["cpu_microseconds_per_token"] > 0
        assert row["link_tokens_per_second"] == pytest.approx(1.25e9 / row["bytes_per_token"], rel=1e-3)


def test_a_line_names_the_cores_that_the_link_takes() -> None:
    row = {
        "cut": "rows", "way": "codes", "threads_each_way": 2, "tokens_per_second": 400_000,
        "cpu_microseconds_per_token": 2.5, "link_tokens_per_second": 2_000_000,
    }  # fmt: skip
    assert describe(row) == (
        "codecs  rows        codes  by  2 threads each way  400k tokens/s, 2.50 CPU us a token; "
        "a link of 10 Gbit/s carries 2,000k, which take 5.0 cores"
    )
