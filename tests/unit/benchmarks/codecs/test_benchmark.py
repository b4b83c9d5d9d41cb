"""The bench on a tiny text: what is trained, what is not repeated, what the record and the table say."""

import json
from dataclasses import asdict

import pytest

from benchmarks.codecs import benchmark as codecs
from benchmarks.codecs import counted
from benchmarks.codecs.benchmark import CodecsOptions, rows_of, summarize, table
from benchmarks.codecs.counted import Sizes, counted_table
from benchmarks.codecs.settings import BASELINE, Setting, all_in

TINY = (
    "model.num_hidden_layers=1",
    "run.windows=2",
    "window.tokens=200",
    "window.tokens_per_micro_batch=64",
    "tokenizer.vocab_size=100",
)


def run_of(setting, seed, loss):
    return {
        "setting": json.dumps(asdict(setting)), "seed": seed, "held_out_loss": loss, "training_loss": loss,
        "tokens": 100, "bytes_up": 300, "bytes_down": 200, "seconds": 1.0,
    }  # fmt: skip


@pytest.fixture
def options(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for number in range(8):
        words = "a lobster lives on the sea floor and moults several times a year"
        (text / f"{number}.txt").write_text(f"{words} {number} " * 40)
    return CodecsOptions(
        out=tmp_path / "out" / "codecs.json",
        command="fedbert-ds bench codecs",
        data=str(text),
        work=tmp_path / "work",
        seeds=2,
        overrides=TINY,
    )


def test_a_record_of_every_setting_and_seed(options, monkeypatch, capsys):
    monkeypatch.setattr(codecs, "MAIN", (BASELINE, all_in("int8")))
    monkeypatch.setattr(codecs, "FURTHER", (all_in("fp32", model="factorized", extra="unit projection"),))
    monkeypatch.setattr(counted, "TOKENS", 600)
    monkeypatch.setattr(counted, "WIDTH", 192)
    codecs.bench_codecs(options)
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

    monkeypatch.setattr(codecs, "train", forbidden)
    codecs.bench_codecs(options)
    again = json.loads(options.out.read_text())
    assert again["rows"] == record["rows"]


def test_late_runs_are_left_out(options, monkeypatch):
    monkeypatch.setattr(codecs, "MAIN", (BASELINE,))
    monkeypatch.setattr(codecs, "FURTHER", (all_in("int8"),))
    monkeypatch.setattr(codecs, "train", lambda setting, seed, config, text: run_of(setting, seed, 5.0))
    times = iter([0.0, 1.0, 61.0, 61.0, 61.0])
    monkeypatch.setattr(codecs.time, "monotonic", lambda: next(times))
    codecs.bench_codecs(CodecsOptions(**{**vars(options), "minutes": 1.0}))
    assert len(json.loads(options.out.read_text())["rows"]) == 1


def test_cost_is_over_fp32_of_the_same_model_and_seed():
    factorized, coarse = Setting(model="factorized"), all_in("int8", model="factorized")
    runs = [
        run_of(BASELINE, 1, 5.0), run_of(BASELINE, 2, 4.0), run_of(all_in("int8"), 1, 5.05),
        run_of(all_in("int8"), 2, 4.08), run_of(factorized, 1, 6.0), run_of(coarse, 1, 6.06),
        run_of(all_in("bf16"), 3, 5.0),
    ]  # fmt: skip
    rows = rows_of(runs)
    assert [row["cost"] and round(row["cost"], 6) for row in rows] == [0, 0, 0.01, 0.02, 0.2, 0.01, None]
    assert (rows[0]["bytes_per_token_up"], rows[0]["bytes_per_token_down"]) == (3.0, 2.0)
    size = Sizes(10.0, 20.0, 33.0)
    summary = summarize(rows, {setting: size for setting in (BASELINE, all_in("int8"), all_in("bf16"))})
    assert len(summary) == 2, "bf16 has nothing to be held against"
    assert summary[1]["seeds"] == 2 and summary[1]["bytes_per_token"] == 30.0
    assert summary[1]["bytes_per_token_not_compressed"] == 33.0
    assert summary[1]["cost"] == pytest.approx(0.015)
    assert "| +1.50 % | +1.00 to +2.00 | 2 |" in table(summary)


def test_settings_differ():
    settings = (*codecs.MAIN, *codecs.FURTHER)
    assert len(set(settings)) == len({setting.label for setting in settings}) == len(settings)
    assert settings[0] == BASELINE
