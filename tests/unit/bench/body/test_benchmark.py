"""The body's benchmark: what it measures, what it leaves out, what it writes, and what it
refuses."""

import json

import pytest
import torch

from fedbert_ds.bench.body import benchmark as module
from fedbert_ds.bench.body.benchmark import (
    BY_LENGTH,
    COMPILED,
    CPU_PLAN,
    OURS,
    PADDED,
    QUICK_PLAN,
    SENTENCES,
    TINY,
    BodyOptions,
    bench_body,
    mixes,
    table,
    ways,
)
from fedbert_ds.bench.body.encoders import Window
from fedbert_ds.cli import main
from fedbert_ds.errors import ConfigError

CPU = torch.device("cpu")
SENTENCE_LENGTHS = [5, 9, 30, 12, 7] * 60


@pytest.fixture
def options(tmp_path):
    text = tmp_path / "some.txt"
    text.write_text("The fox runs. The quick fox runs far away from the dog, and the dog sleeps. " * 60)
    return BodyOptions(
        out=tmp_path / "results" / "body.json", command="fedbert-ds bench body", data=str(text), rounds=1, quick=True
    )


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(module, "default_device", lambda: CPU)


def test_a_window_is_full_of_equal_lengths_or_of_sentences():
    found = mixes(CPU_PLAN, SENTENCE_LENGTHS)
    assert list(found) == ["all 64", "all 128", SENTENCES]
    assert found["all 64"] == [64] * 128 and found["all 128"] == [128] * 64
    assert set(found[SENTENCES]) == set(SENTENCE_LENGTHS)
    short = mixes(QUICK_PLAN, SENTENCE_LENGTHS)[SENTENCES]
    assert QUICK_PLAN.window - 30 < sum(short) <= QUICK_PLAN.window
    # In no order of the text's, and the same every time.
    assert short[:5] != SENTENCE_LENGTHS[:5]
    assert short == mixes(QUICK_PLAN, SENTENCE_LENGTHS)[SENTENCES]


def test_sorting_is_for_lengths_that_differ_and_compiling_takes_its_time(options):
    def names(lengths, quick):
        window = Window.draw(lengths, TINY.hidden_size, CPU, torch.float32)
        return set(ways(TINY, window, QUICK_PLAN, BodyOptions(options.out, "", quick=quick), CPU))

    assert names([8, 8], quick=False) == {OURS, PADDED, COMPILED}
    assert names([8, 9], quick=False) == {OURS, PADDED, COMPILED, BY_LENGTH}
    assert names([8, 9], quick=True) == {OURS, PADDED, BY_LENGTH}


def test_record_and_picture(options, capsys):
    bench_body(options)
    record = json.loads(options.out.read_text())
    assert {"command", "commit", "machine", "versions", "device", "settings", "text", "left_out", "rows"} == set(record)
    assert record["text"]["source"] == "some.txt" and record["text"]["sentences"] == 120
    assert [(row["lengths"], row["way"]) for row in record["rows"]] == [
        ("all 32", OURS), ("all 32", PADDED), (SENTENCES, OURS), (SENTENCES, PADDED), (SENTENCES, BY_LENGTH),
    ]  # fmt: skip
    for row in record["rows"]:
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])
        assert row["mfu"] == pytest.approx(row["flops_per_second"] / row["matmul_flops_per_second"])
        assert (row["way"] == PADDED) <= (row["beside_padded"] == 1.0)
    padding = {row["way"]: row["computed_tokens"] / row["tokens"] for row in record["rows"][2:]}
    assert padding[PADDED] > padding[BY_LENGTH] >= padding[OURS] == 1.0
    assert options.out.with_suffix(".png").stat().st_size > 1000
    assert table(record["rows"][2:]) in capsys.readouterr().out


def test_a_known_card_is_measured_by_its_peak_too(options, monkeypatch, capsys):
    bench_body(options)
    assert "of the card's peak" not in capsys.readouterr().out
    monkeypatch.setattr(module, "nominal_rate", lambda *_: 1e15)
    bench_body(options)
    for row in json.loads(options.out.read_text())["rows"]:
        assert row["share_of_nominal"] == pytest.approx(row["flops_per_second"] / 1e15)
    assert "| of the card's peak |" in capsys.readouterr().out


def test_a_way_that_fails_is_left_out_and_said(options, monkeypatch, capsys):
    def fail(*_, by_length=False, **__):
        if by_length:
            raise RuntimeError("out of memory\nand pages more")
        return padded(*_, **__)

    padded = module.padded_step
    monkeypatch.setattr(module, "padded_step", fail)
    bench_body(options)
    record = json.loads(options.out.read_text())
    assert record["left_out"] == {f"{BY_LENGTH} (BERT 2 x 64, sentences)": "out of memory"}
    assert len(record["rows"]) == 4
    assert "left out: transformers, padded, sorted by length (BERT 2 x 64, sentences): out of memory" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("way", ["packed_step", "padded_step"])
def test_the_two_that_are_compared_must_run(options, monkeypatch, way):
    def fail(*_, **__):
        raise RuntimeError("broken")

    monkeypatch.setattr(module, way, fail)
    with pytest.raises(RuntimeError, match="broken"):
        bench_body(options)
    assert not options.out.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--dropout", "1"], "--dropout 1: must be at least 0 and below 1"),
        (["--rounds", "0"], "--rounds 0: at least 1"),
        (["--data", "no-such-file.txt"], "no-such-file.txt: no such file"),
    ],
)
def test_a_mistake_is_one_line(arguments, says, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["bench", "body", "--quick", "--out", str(tmp_path / "body.json"), *arguments])
    assert exit_.value.code not in (0, None)
    assert [line for line in capsys.readouterr().err.splitlines() if says in line and line.startswith("fedbert-ds: ")]
    assert not (tmp_path / "body.json").exists()


def test_triton_without_a_gpu_is_refused(options, monkeypatch):
    from fedbert_kernels import interpreter

    monkeypatch.setattr(interpreter, "INTERPRETED", False)
    with pytest.raises(ConfigError, match="kernels: triton needs"):
        bench_body(BodyOptions(options.out, "", kernels="triton", quick=True))
