"""--tune goes once through each shape, and measures LayerNorm and GELU beside torch.compile's."""

import math

import torch

from fedbert_ds.bench.kernels.benchmark import KERNELS
from fedbert_ds.bench.kernels.tuning import choose_rows, tune_launches
from fedbert_kernels import attention_tuning
from fedbert_kernels.launch import Launch

CPU = torch.device("cpu")


def test_tuning_goes_once_through_each_shape(monkeypatch) -> None:
    launch = Launch(64, 64, 4, 1)
    tuned = []

    def tune(lengths, heads, head_size, dtype, dropout, device):
        tuned.append((lengths, dropout))
        return {f"forward {len(tuned)}": (launch, 0.5)}

    monkeypatch.setattr(attention_tuning, "tune", tune)
    mixes = {"a": [512, 512], "b": [500, 300], "c": [20, 25]}
    found = tune_launches(mixes, ((2, 64),), torch.bfloat16, CPU)
    assert tuned == [(mixes["a"], 0.0), (mixes["a"], 0.1), (mixes["c"], 0.0), (mixes["c"], 0.1)]
    assert [row["tuned_on"] for row in found] == ["a", "a", "c", "c"]
    assert found[0]["rows"] == 64 and found[0]["time_over_default"] == 0.5


def test_tuning_measures_layer_norm_and_gelu_and_tells_who_runs(monkeypatch, capsys) -> None:
    from fedbert_kernels import row_choice

    measured = []

    def measure_again(cases, device):
        measured.extend(case.name for case in cases)
        return {measured[0]: (1.0, 2.0), measured[1]: (1.0, 0.5), measured[2]: (math.inf, 1.0)}

    monkeypatch.setattr(row_choice, "measure_again", measure_again)
    found = choose_rows(KERNELS, (256,), torch.bfloat16, CPU)
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
    assert choose_rows(("attention", "GELU"), (256,), torch.bfloat16, CPU) == []
    assert [case.kernel for case in measured] == ["GELU"]
