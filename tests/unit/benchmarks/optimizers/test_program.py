"""`python -m benchmarks.optimizers` hands on what was typed, trains, and counts windows rightly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.optimizers import __main__ as program
from benchmarks.optimizers.benchmark import OptimizersOptions, bench_optimizers, table, windows_to_reach


def test_options_reach_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(program, "bench_optimizers", given.append)
    arguments = ["--out", "o.json", "--rates", "1e-3", "2e-3", "--seeds", "2", "--every", "5", "--set", "run.windows=9"]
    monkeypatch.setattr("sys.argv", ["benchmarks/optimizers/__main__.py", *arguments])
    program.main(arguments)
    (options,) = given
    assert options.out == Path("o.json") and not options.quick
    assert (options.rates, options.seeds, options.every) == ((1e-3, 2e-3), 2, 5)
    assert options.overrides == ("run.windows=9",)
    assert options.command.startswith("python -m benchmarks.optimizers --out o.json --rates")


@pytest.mark.timeout(300)
def test_it_trains_both_on_the_same_text_at_their_best_rates(tmp_path: Path) -> None:
    sentence = "the federated model learns from text that never leaves a clinic by the sea"
    words = sentence.split()
    articles = [f" = Title {n} = \n" + " ".join(words[n % 7 :] + words[: n % 5]) * 8 + "\n" for n in range(12)]
    text = tmp_path / "text.tokens"
    text.write_text("\n".join(articles), encoding="utf-8")
    out = tmp_path / "record.json"
    overrides = (f'data.source=["{text}"]', "data.held_out=0.3", "model.hidden_size=16", "run.windows=3")
    options = OptimizersOptions(out, "command", rates=(1e-3, 1e-2), seeds=2, every=2, quick=True, overrides=overrides)
    bench_optimizers(options)
    record = json.loads(out.read_text())
    assert [(row["optimizer"], row["rate"]) for row in record["trials"]] == [
        ("adamw", 1e-3), ("adamw", 1e-2), ("muon", 1e-3), ("muon", 1e-2),
    ]  # fmt: skip
    for name in ("adamw", "muon"):
        trials = [row for row in record["trials"] if row["optimizer"] == name]
        best = min(trials, key=lambda row: row["held_out"][-1]["loss"])["rate"]
        rows = [row for row in record["rows"] if row["optimizer"] == name]
        assert record["best"][name] == best and [row["rate"] for row in rows] == [best] * 2
        assert [row["seed"] for row in rows] == [0, 1]
        assert [point["windows"] for point in rows[0]["held_out"]] == [2, 3]
    losses = [[point["loss"] for point in row["held_out"]] for row in record["trials"] + record["rows"]]
    assert len({tuple(each) for each in losses}) == len(losses), "two runs are the same"
    assert record["settings"]["windows"] == 3 and record["settings"]["model"]["hidden_size"] == 16
    assert str(tmp_path) not in json.dumps(record["settings"])
    assert out.with_suffix(".png").is_file()


def curve(*losses: float) -> list[dict[str, float]]:
    return [{"windows": 10 * (number + 1), "loss": loss} for number, loss in enumerate(losses)]


def test_a_loss_is_reached_between_two_evaluations() -> None:
    assert windows_to_reach(curve(5.0, 4.0, 3.0), 4.5) == 15
    assert windows_to_reach(curve(5.0, 4.0, 3.0), 3.0) == 30
    assert windows_to_reach(curve(5.0, 4.0, 3.0), 6.0) == 10
    assert windows_to_reach(curve(5.0, 4.0, 3.0), 2.9) is None


def test_the_table_tells_what_was_not_reached() -> None:
    def rows(seed: int, adamw: list[dict[str, float]], muon: list[dict[str, float]]) -> list[dict[str, Any]]:
        return [
            {"seed": seed, "optimizer": name, "held_out": held_out}
            for name, held_out in (("adamw", adamw), ("muon", muon))
        ]

    both = rows(0, curve(5.0, 4.0), curve(4.0, 3.0)) + rows(1, curve(5.0, 4.0), curve(4.5, 3.5))
    assert table(both).splitlines()[2:] == [
        "| 0 | 4.000 | 3.000 | 50 % |",
        "| 1 | 4.000 | 3.500 | 75 % |",
        "| mean |  |  | 62 % |",
    ]
    assert table([*both, *rows(2, curve(5.0, 4.0), curve(5.0, 4.5))]).splitlines()[-2:] == [
        "| 2 | 4.000 | 4.500 | never |",
        "| mean |  |  | not all |",
    ]
