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
    # 40 tokens and 6 masked ones of 772 bytes each before compression.
    uncompressed = 46 * 772 / 40
    assert 0.85 * uncompressed < embeddings["bytes_per_token_each_way"] < uncompressed
    assert by_rows["bytes_per_token_each_way"] < embeddings["bytes_per_token_each_way"]
    for row in rows:
        assert row["tokens_per_second"] > 0 and row["cpu_microseconds_per_token"] > 0
        assert row["cores_needed"] == pytest.approx(0.78 * row["cpu_microseconds_per_token"], rel=0.01)
        assert row["gbit_needed_each_way"] == pytest.approx(0.00624 * row["bytes_per_token_each_way"], rel=0.01)


def test_a_line_names_what_the_body_needs() -> None:
    row = {
        "cut": "rows", "way": "codes", "threads_each_way": 2, "tokens_per_second": 400_000,
        "cpu_microseconds_per_token": 2.5, "needed_tokens_per_second": 780_000, "cores_needed": 1.95,
        "gbit_needed_each_way": 1.5,
    }  # fmt: skip
    assert describe(row) == (
        "codecs  rows        codes  by  2 threads each way  400k tokens/s, 2.50 CPU us a token; "
        "780k take 1.9 cores and 1.5 Gbit/s each way"
    )
