"""The benchmark on a tiny text: what is trained, what is not repeated, what the record and the
table say."""

import json

import pytest

from benchmarks.codecs import benchmark, counted, runs
from benchmarks.codecs.report import counted_table, table
from benchmarks.codecs.settings import BASELINE, CHOICES, FURTHER, MAIN, CodecsOptions, all_in, only

RESULT = {
    "held_out_loss": 5.0, "training_loss": 5.0, "tokens": 100, "bytes_up": 300, "bytes_down": 200, "seconds": 1.0,
}  # fmt: skip
TINY = (
    "model.num_hidden_layers=1",
    "run.windows=2",
    "window.tokens=200",
    "window.tokens_per_micro_batch=64",
    "tokenizer.vocab_size=100",
)


@pytest.fixture
def options(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for number in range(8):
        words = "a lobster lives on the sea floor and moults several times a year"
        (text / f"{number}.txt").write_text(f"{words} {number} " * 40)
    return CodecsOptions(
        out=tmp_path / "out" / "codecs.json",
        command="python -m benchmarks.codecs",
        data=str(text),
        work=tmp_path / "work",
        seeds=2,
        overrides=TINY,
    )


def test_a_record_of_every_setting_and_seed(options, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "MAIN", (BASELINE, all_in("int8")))
    monkeypatch.setattr(benchmark, "FURTHER", (all_in("fp32", model="factorized", extra="unit projection"),))
    monkeypatch.setattr(counted, "TOKENS", 600)
    monkeypatch.setattr(counted, "WIDTH", 192)
    benchmark.bench_codecs(options)
    record = json.loads(options.out.read_text())
    assert [(row["model"], row["gradients"], row["seed"]) for row in record["rows"]] == [
        ("full", "fp32", 1), ("full", "int8", 1), ("full", "fp32", 2), ("full", "int8", 2),
        ("factorized", "fp32", 1), ("factorized", "fp32", 2),
    ]  # fmt: skip
    assert all(row["cost"] == 0 for row in record["rows"][:3:2]) and record["rows"][4]["cost"] != 0
    assert [row["seeds"] for row in record["summary"]] == [2, 2, 2]
    assert record["text"]["source"] == "text"
    (text,) = record["counted"]
    assert text["tokens"] <= 600 and text["width"] == 192 and text["source"] == "text"
    assert [size["gradients"] for size in text["sizes"]] == ["fp32", "int8", "fp32"]
    for size, row in zip(text["sizes"], record["summary"], strict=True):
        assert size["up"] + size["down"] == pytest.approx(row["bytes_per_token"])
        assert size["up"] + size["down"] < size["not_compressed"] == row["bytes_per_token_not_compressed"]
    assert options.out.with_suffix(".png").is_file()
    printed = capsys.readouterr().out
    assert table(record["summary"]) in printed and counted_table(record["counted"]) in printed

    def forbidden(*arguments):
        raise AssertionError("a finished run was repeated")

    monkeypatch.setattr(runs, "train", forbidden)
    benchmark.bench_codecs(options)
    again = json.loads(options.out.read_text())
    assert again["rows"] == record["rows"]


def test_late_runs_are_left_out(options, monkeypatch):
    monkeypatch.setattr(benchmark, "MAIN", (BASELINE,))
    monkeypatch.setattr(benchmark, "FURTHER", (all_in("int8"),))
    monkeypatch.setattr(counted, "TOKENS", 600)
    monkeypatch.setattr(counted, "WIDTH", 192)
    monkeypatch.setattr(runs, "train", lambda *_: RESULT)
    times = iter([0.0, 1.0, 61.0, 61.0, 61.0])
    monkeypatch.setattr(benchmark.time, "monotonic", lambda: next(times))
    benchmark.bench_codecs(CodecsOptions(**{**vars(options), "minutes": 1.0}))
    assert len(json.loads(options.out.read_text())["rows"]) == 1


def test_settings_differ():
    settings = (*MAIN, *FURTHER)
    assert len(set(settings)) == len({setting.label for setting in settings}) == len(settings)
    assert settings[0] == BASELINE


def test_of_chosen_codecs_only_the_runs_with_all_in_one_are_made():
    assert only(MAIN, ()) == MAIN
    assert only(MAIN, ("int8", "bf16")) == (BASELINE, all_in("int8"))
    assert only(FURTHER, ("int8", "bf16")) == (all_in("bf16"),)
    assert only(FURTHER, ("kept-int8",)) == (all_in("fp32", extra="kept in int8"),)
    assert all(only((*MAIN, *FURTHER), (name,)) != (BASELINE,) for name in CHOICES if name != "fp32")
