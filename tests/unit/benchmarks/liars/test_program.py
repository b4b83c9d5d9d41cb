"""`python -m benchmarks.liars` hands on what was typed; its liars lie in real runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.liars import __main__ as program
from benchmarks.liars import benchmark
from benchmarks.liars.benchmark import LiarsOptions, bench_liars, cases, table
from benchmarks.liars.lies import LIES, lying
from fedbert_ds.wire import fedbert_pb2 as pb


def test_options_reach_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(program, "bench_liars", given.append)
    arguments = ["--out", "o.json", "--modes", "whole", "--combine", "mean", "krum", "--set", "run.windows=9"]
    monkeypatch.setattr("sys.argv", ["benchmarks/liars/__main__.py", *arguments])
    program.main(arguments)
    (options,) = given
    assert options.out == Path("o.json") and options.combine == ("mean", "krum") and not options.quick
    assert options.command.startswith("python -m benchmarks.liars --out o.json --modes whole")
    assert [(case.combine, case.liars) for case in cases(options)] == [
        (combine, liars) for combine in ("mean", "krum") for liars in (0, 1, 3)
    ]


def test_a_lie_is_well_formed() -> None:
    values = np.array([1.0, -2.0], np.float32)
    frame = pb.TensorFrame(codec="fp32", shape=[1, 2], payload=values.tobytes())
    true = pb.ClientMessage(gradient=pb.Gradient(window=3, hidden=frame, loss_sum=5.0))
    told = lying(true, LIES["flip"])
    assert np.frombuffer(told.gradient.hidden.payload, np.float32).tolist() == [-10.0, 20.0]
    assert told.gradient.loss_sum == 0.0 and told.gradient.window == 3 and true.gradient.loss_sum == 5.0
    last = pb.ClientMessage(update=pb.UpdateChunk(window=3, last=True))
    assert lying(last, LIES["noise"]) == last


@pytest.mark.timeout(900)
def test_real_liars_are_bounded_and_named_in_both_modes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "LIARS", (1,))
    out, work = tmp_path / "record.json", tmp_path / "work"
    bench_liars(LiarsOptions(out, "command", work, combine=("mean",), quick=True))
    record = json.loads(out.read_text())
    assert [(row["mode"], row["liars"]) for row in record["rows"]] == [("whole", 1), ("synchronous", 1)]
    for row in record["rows"]:
        assert row["bounded"] > 0 and row["held_out_loss"] < record["unigram_loss"] + 2.0
        assert f"{row['held_out_loss']:.2f}" in table(record["rows"], row["mode"], "flip")
    # In `synchronous` mode a client of little text may send the more for each token.
    for mode, what in (("whole", "update"), ("synchronous", "gradient")):
        assert f"client client-09: its {what} was" in (work / f"{mode}-mean-1-flip.log").read_text()
    assert str(tmp_path) not in json.dumps(record["settings"])
