"""`bench network` measures the parts that are asked for and records their rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedbert_ds.bench.network import benchmark
from fedbert_ds.bench.network.benchmark import NetworkOptions, bench_network


def test_parts_are_measured_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def part(name: str) -> tuple:
        return lambda options: iter([{"what": name, "quick": options.quick}]), lambda row: row["what"].upper()

    parts = {name: part(name) for name in ("codecs", "ingress", "transfers", "streams")}
    monkeypatch.setattr(benchmark, "PARTS", parts)
    options = NetworkOptions(out=tmp_path / "network.json", command="fedbert-ds bench network", quick=True)
    bench_network(options)
    record = json.loads(options.out.read_text())
    assert record["command"] == "fedbert-ds bench network"
    assert record["rows"] == [{"what": name, "quick": True} for name in ("codecs", "ingress", "transfers")]
    assert capsys.readouterr().out.splitlines()[:3] == ["CODECS", "INGRESS", "TRANSFERS"]


def test_streams_are_as_many_and_as_long_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, float]] = []
    monkeypatch.setattr(
        benchmark.streams, "stream_rows", lambda streams, seconds: asked.append((streams, seconds)) or iter([])
    )
    measure, _ = benchmark.PARTS["streams"]
    for quick in (False, True):
        list(measure(NetworkOptions(Path("out.json"), "", streams=9, minutes=2.0, quick=quick)))
    assert asked == [(9, 120.0), (9, 6.0)]
