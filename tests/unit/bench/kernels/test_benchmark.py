"""bench kernels as a whole, with made-up times: record, picture, table; what --tune and --kernel refuse."""

import json
import math

import pytest
import torch

from fedbert_ds.bench.device import Timing
from fedbert_ds.bench.kernels import baselines
from fedbert_ds.bench.kernels import benchmark as kernels
from fedbert_ds.bench.kernels.baselines import BOTH, FORWARD, OURS
from fedbert_ds.bench.kernels.benchmark import KernelsOptions, bench_kernels, compares, parse_kernels
from fedbert_ds.bench.kernels.report import table
from fedbert_ds.errors import RunError
from fedbert_kernels import attention_tuning
from fedbert_kernels.launch import Launch

CPU = torch.device("cpu")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.fixture
def quick(monkeypatch) -> None:
    """Everything is checked and nothing timed."""
    monkeypatch.setattr(
        baselines, "time_side_by_side", lambda calls, *_, **__: dict.fromkeys(calls, Timing(1e-3, 5e-4, 2e-3))
    )
    monkeypatch.setattr(kernels, "matmul_rate", lambda *_: 1e12)
    monkeypatch.setattr(kernels, "memory_bandwidth", lambda *_: 1e10)
    monkeypatch.setattr(kernels, "CODECS", ("int8",))
    monkeypatch.setattr(kernels, "QUICK_CPU", kernels.Sizes(64, ((1, 16),), (64,), 50, 1, 0.0))


def test_record_picture_and_table(quick, tmp_path, capsys) -> None:
    out = tmp_path / "results" / "kernels.json"
    bench_kernels(KernelsOptions(out, "fedbert-ds bench kernels --quick", quick=True), CPU)
    record = json.loads(out.read_text())
    assert record["command"] == "fedbert-ds bench kernels --quick"
    assert {"commit", "machine", "versions", "device", "settings", "compares", "measured_peaks", "extras"} < set(record)
    assert "no GPU was used" in record["compares"] and record["device"]["device"] == "cpu"
    assert {row["kernel"] for row in record["rows"]} == {
        "attention", "layer norm", "GELU", "linear + cross-entropy", "quantize", "dequantize",
    }  # fmt: skip
    # Whoever is not measured says why, and ours always is.
    assert all(("milliseconds" in row) != ("reason" in row) for row in record["rows"])
    assert all("milliseconds" in row for row in record["rows"] if row["rival"] == OURS)
    assert out.with_suffix(".png").is_file()
    printed = capsys.readouterr().out
    assert table(record["rows"]) in printed and "no GPU was used" in printed
    assert str(tmp_path) not in out.read_text(), "no path of this machine"


def test_the_real_mixes_come_from_the_text(quick, tmp_path, monkeypatch) -> None:
    sources = []
    monkeypatch.setattr(kernels, "sentence_lengths", lambda source: sources.append(source) or [9, 30])
    monkeypatch.setattr(kernels, "article_lengths", lambda source: sources.append(source) or [100, 28])
    options = KernelsOptions(tmp_path / "x.json", "", data="/some/where/wiki.tokens", kernels=("attention",))
    mixes = kernels._mixes(options, 512)
    assert sources == [options.data] * 2
    assert list(mixes) == ["all 128", "all 512", "sentences", "articles"]
    assert set(mixes["sentences"]) == {9, 30} and set(mixes["articles"]) <= {100, 28}
    assert mixes["all 128"] == [128] * 4 and mixes["all 512"] == [512]
    found = list(kernels.problems(options, kernels.QUICK_CPU, mixes, torch.float32, CPU))
    assert [(problem.case, problem.dropout) for problem in found] == [
        (case, dropout) for case in mixes for dropout in (0.0, 0.1)
    ]
    assert kernels._name(options) == "wiki.tokens", "a record names no folder"


def test_one_kernel_alone(quick, tmp_path) -> None:
    out = tmp_path / "gelu.json"
    bench_kernels(KernelsOptions(out, "", kernels=("GELU",), quick=True), CPU)
    assert {row["kernel"] for row in json.loads(out.read_text())["rows"]} == {"GELU"}


def test_tuning_without_a_gpu_is_refused(tmp_path) -> None:
    with pytest.raises(RunError, match="--tune needs a GPU"):
        bench_kernels(KernelsOptions(tmp_path / "x.json", "", tune=True, quick=True), CPU)


def test_tuning_goes_once_through_each_shape(monkeypatch) -> None:
    launch = Launch(64, 64, 4, 1)
    tuned = []

    def tune(lengths, heads, head_size, dtype, dropout, device):
        tuned.append((lengths, dropout))
        return {f"forward {len(tuned)}": (launch, 0.5)}

    monkeypatch.setattr(attention_tuning, "tune", tune)
    mixes = {"a": [512, 512], "b": [500, 300], "c": [20, 25]}
    found = kernels._tune(mixes, kernels.QUICK_CPU, torch.bfloat16, CPU)
    assert tuned == [(mixes["a"], 0.0), (mixes["a"], 0.1), (mixes["c"], 0.0), (mixes["c"], 0.1)]
    assert [row["tuned_on"] for row in found] == ["a", "a", "c", "c"]
    assert found[0]["rows"] == 64 and found[0]["time_over_default"] == 0.5


def test_an_unknown_kernel_is_refused() -> None:
    assert parse_kernels([]) == kernels.KERNELS and parse_kernels(["GELU"]) == ("GELU",)
    with pytest.raises(RunError, match="--kernel softmax: choose among attention"):
        parse_kernels(["softmax"])


def test_what_is_compared_is_said() -> None:
    assert "plain torch" in compares(CPU)


# ---- the table ----


def row(rival: str, what: str, milliseconds: float | None, **more) -> dict:
    figures = {"reason": "needs a GPU"} if milliseconds is None else {
        "milliseconds": milliseconds, "GB/s": 100 / milliseconds, "share_of_peak": 0.5,
    }  # fmt: skip
    return {"kernel": "GELU", "case": "width 8", "dropout": 0.0, "rival": rival, "pass": what} | figures | more


def test_the_table_says_how_many_times_faster_ours_is() -> None:
    rows = [row(OURS, FORWARD, 1.0), row("a", FORWARD, 3.0), row(OURS, BOTH, 2.0), row("a", BOTH, 5.0)]
    lines = table(rows).splitlines()
    assert "| GELU | width 8 | ours | 1 | 2 | 50 GB/s | 50% |  |" in lines
    assert "| GELU | width 8 | a | 3 | 5 | 20 GB/s | 50% | 2.50x |" in lines


def test_who_lacks_a_backward_is_compared_forward_and_who_lacks_all_is_named_below() -> None:
    rows = [
        row(OURS, FORWARD, 1.0), row("a", FORWARD, 3.0), row("b", FORWARD, None),
        row(OURS, BOTH, 2.0), row("a", BOTH, None), row("b", BOTH, None),
    ]  # fmt: skip
    lines = table(rows).splitlines()
    assert "| GELU | width 8 | a | 3 |  | 33.3 GB/s | 50% | 3.00x |" in lines
    assert lines[-1].startswith("Not measured, needs a GPU: ") and "b" in lines[-1]
    assert "a (GELU, width 8, forward + backward)" in lines[-1]


def test_small_rates_are_in_gflops() -> None:
    rows = [row(OURS, FORWARD, 1.0) | {"TFLOP/s": 0.0123}]
    assert "12.3 GFLOP/s" in table(rows)


def test_tuning_measures_layer_norm_and_gelu_and_tells_who_runs(monkeypatch, capsys) -> None:
    from fedbert_kernels import row_choice

    measured = []

    def measure_again(cases, device):
        measured.extend(case.name for case in cases)
        return {measured[0]: (1.0, 2.0), measured[1]: (1.0, 0.5), measured[2]: (math.inf, 1.0)}

    monkeypatch.setattr(row_choice, "measure_again", measure_again)
    found = kernels._choose_rows(kernels.KERNELS, kernels.QUICK_CPU, torch.bfloat16, CPU)
    assert measured == ["layer norm bfloat16 256", "layer norm bfloat16 256 dropout", "GELU bfloat16 1024"]
    assert found == [
        {"case": measured[0], "kept": True, "ours": 1.0, "torch.compile": 2.0},
        {"case": measured[1], "kept": False, "ours": 1.0, "torch.compile": 0.5},
        {"case": measured[2], "kept": False, "ours": None, "torch.compile": 1.0},
    ]
    assert [line.split(": ")[1].split(" runs")[0] for line in capsys.readouterr().out.splitlines()] == [
        "our kernel", "torch.compile", "torch.compile"
    ]  # fmt: skip
    measured.clear()
    monkeypatch.setattr(row_choice, "measure_again", lambda cases, device: measured.extend(cases) or {})
    assert kernels._choose_rows(("attention", "GELU"), kernels.QUICK_CPU, torch.bfloat16, CPU) == []
    assert [case.kernel for case in measured] == ["GELU"]
