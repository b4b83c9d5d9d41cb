"""`python -m benchmarks.large_text` hands on what was typed, writes its text, prints its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.large_text import __main__ as program
from benchmarks.large_text.benchmark import SHOWN, LargeTextOptions, bench_large_text, facts_of, table, write_large
from fedbert_ds.data.corpus import read_articles
from fedbert_ds.errors import ConfigError


def test_options_reach_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(program, "bench_large_text", given.append)
    arguments = ["--out", "o.json", "--gigabytes", "0.5"]
    monkeypatch.setattr("sys.argv", ["benchmarks/large_text/__main__.py", *arguments])
    program.main(arguments)
    (options,) = given
    assert options.out == Path("o.json") and options.gigabytes == 0.5
    assert options.command == "python -m benchmarks.large_text --out o.json --gigabytes 0.5"


def test_the_text_has_its_size_and_is_the_same_every_time(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        write_large(tmp_path / name, 300_000)
    assert 300_000 <= (tmp_path / "a.jsonl").stat().st_size < 400_000
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert len(list(read_articles([str(tmp_path / "a.jsonl")]))) > 20


def test_a_disk_without_room_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"2500000\.0 GB are needed there; name another folder"):
        bench_large_text(LargeTextOptions(tmp_path / "o.json", "command", tmp_path, gigabytes=1e6))
    assert not list(tmp_path.iterdir())


def test_the_table_has_what_the_clients_logs_say() -> None:
    log = (
        "client measured: 1 file, 5,952 articles, 19,778,424 characters, longest word 93\nclient measured: joined\n"
        "client measured: 7,481,355 tokens in 61,374 sequences to train on, 0.50 % [UNK]\n"
    )
    facts = facts_of(log)
    assert facts == {"articles": 5952, "tokens": 7_481_355, "sequences": 61_374} and facts_of("") == {}
    row = {"begins": "fresh", "bytes": 2 * 10**7, "seconds": 90, "peak_mb": 418.4, "phases": dict.fromkeys(SHOWN, 1.0)}
    assert table([row | facts]).splitlines()[2] == "| fresh | 0.02 | 7 | 61 | 1.5 | 418 | 1 | 1 | 1 | 1 | 1 | 1 |"
