"""`bench pipeline` with a system whose row is known; real runs are tried by its own --quick."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedbert_ds.bench.pipeline.benchmark import bench_pipeline
from fedbert_ds.bench.pipeline.settings import Baseline, PipelineOptions, Run
from fedbert_ds.data.corpus import Article
from fedbert_ds.data.shards import write_shard


@pytest.fixture(autouse=True)
def same_handler() -> Iterator[None]:
    """The benchmark unwinds on SIGTERM; the test process goes on as before."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def test_a_baseline_is_measured_and_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shard(tmp_path / "text.jsonl", [Article(str(n), "a lobster lives on the sea floor " * 20) for n in range(4)])
    seen: list[Run] = []

    def measure(run: Run) -> dict[str, object]:
        seen.append(run)
        return run.row(1234.0, 0.5)

    options = PipelineOptions(
        out=tmp_path / "results" / "pipeline.json",
        command="python -m some.program",
        work=tmp_path / "work",
        clients=2,
        rtt_ms=(5.0, 50.0),
        only=("other",),
        overrides=(f"data.source=[{tmp_path / 'text.jsonl'}]", "tokenizer.vocab_size=100"),
    )
    bench_pipeline(options, [Baseline("other", ("",), measure)])
    record = json.loads(options.out.read_text())
    assert record["command"] == "python -m some.program"
    assert {"commit", "machine", "versions", "links", "device", "client_device", "settings", "rows"} < set(record)
    assert [(row["system"], row["rtt_ms"], row["tokens_per_second"]) for row in record["rows"]] == [
        ("other", 5.0, 1234.0),
        ("other", 50.0, 1234.0),
    ]
    assert options.out.with_suffix(".png").is_file()
    assert str(tmp_path) not in json.dumps(record["settings"]["body"]), "no path of this machine"
    assert [path.name for path in sorted(seen[0].shards.glob("*.jsonl"))] == ["client-000.jsonl", "client-001.jsonl"]
    assert seen[0].config.tokenizer.path == str(seen[0].tokenizer)
    assert "1,234 tokens/s" in capsys.readouterr().out
