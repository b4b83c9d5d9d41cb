"""bench kernels as a whole, with made-up times: record and picture; what --tune and --kernel
refuse."""

import json

import pytest
import torch

from fedbert_ds.bench.device import Timing
from fedbert_ds.bench.kernels import benchmark as kernels
from fedbert_ds.bench.kernels import problem as ways
from fedbert_ds.bench.kernels.benchmark import KernelsOptions, bench_kernels, compares, parse_kernels
from fedbert_ds.bench.kernels.problem import OURS
from fedbert_ds.bench.kernels.report import table
from fedbert_ds.bench.kernels.rows import gelu_problem
from fedbert_ds.errors import RunError

CPU = torch.device("cpu")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.fixture
def quick(monkeypatch) -> None:
    """Everything is checked and nothing timed."""
    monkeypatch.setattr(
        ways, "time_side_by_side", lambda calls, *_, **__: dict.fromkeys(calls, Timing(1e-3, 5e-4, 2e-3))
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
    assert all("milliseconds" in row for row in record["rows"] if row["way"] == OURS)
    assert out.with_suffix(".png").is_file()
    printed = capsys.readouterr().out
    assert table(record["rows"]) in printed and "no GPU was used" in printed
    assert str(tmp_path) not in out.read_text(), "no path of this machine"


def test_the_real_mixes_come_from_the_text(quick, tmp_path, monkeypatch) -> None:
    sources = []
    monkeypatch.setattr(kernels, "sentence_lengths", lambda source: sources.append(source) or [9, 30])
    monkeypatch.setattr(kernels, "article_lengths", lambda source: sources.append(source) or [100, 28])
    options = KernelsOptions(tmp_path / "x.json", "", data="/some/where/wiki.tokens", kernels=("attention",))
    mixes = kernels.mixes_of(options, 512)
    assert sources == [options.data] * 2
    assert list(mixes) == ["all 128", "all 512", "sentences", "articles"]
    assert set(mixes["sentences"]) == {9, 30} and set(mixes["articles"]) <= {100, 28}
    assert mixes["all 128"] == [128] * 4 and mixes["all 512"] == [512]
    found = list(kernels.problems(options, kernels.QUICK_CPU, mixes, torch.float32, CPU))
    assert [(problem.case, problem.dropout) for problem in found] == [
        (case, dropout) for case in mixes for dropout in (0.0, 0.1)
    ]


def test_a_record_names_the_text_and_no_folder(quick, tmp_path, monkeypatch) -> None:
    problem = gelu_problem(8, 40, torch.float32, CPU, compiled=False)
    monkeypatch.setattr(kernels, "problems", lambda *_: iter([problem]))
    out = tmp_path / "x.json"
    bench_kernels(KernelsOptions(out, "", data="/some/where/wiki.tokens", kernels=("GELU",)), CPU)
    assert json.loads(out.read_text())["settings"]["data"] == "wiki.tokens" and "/some" not in out.read_text()


def test_further_baselines_are_measured_beside_ours(quick, tmp_path) -> None:
    out = tmp_path / "gelu.json"
    asked = []

    def more(problem, compiled):
        asked.append((problem.kernel, compiled))
        return {"another": problem.ways["torch"]}

    bench_kernels(KernelsOptions(out, "", kernels=("GELU",), quick=True), CPU, more)
    assert asked == [("GELU", False)]
    assert {row["way"] for row in json.loads(out.read_text())["rows"]} == {OURS, "torch", "torch.compile", "another"}


def test_one_kernel_alone(quick, tmp_path) -> None:
    out = tmp_path / "gelu.json"
    bench_kernels(KernelsOptions(out, "", kernels=("GELU",), quick=True), CPU)
    assert {row["kernel"] for row in json.loads(out.read_text())["rows"]} == {"GELU"}


def test_tuning_without_a_gpu_is_refused(tmp_path) -> None:
    with pytest.raises(RunError, match="--tune needs a GPU"):
        bench_kernels(KernelsOptions(tmp_path / "x.json", "", tune=True, quick=True), CPU)


def test_an_unknown_kernel_is_refused() -> None:
    assert parse_kernels([]) == kernels.KERNELS and parse_kernels(["GELU"]) == ("GELU",)
    with pytest.raises(RunError, match="--kernel softmax: choose among attention"):
        parse_kernels(["softmax"])


def test_what_is_compared_is_said() -> None:
    assert "plain torch" in compares(CPU)
