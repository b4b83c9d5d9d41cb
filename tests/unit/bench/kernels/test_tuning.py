"""--tune goes once through each shape, and measures kernels beside their rivals."""

import torch

from fedbert_ds.bench.kernels.benchmark import KERNELS
from fedbert_ds.bench.kernels.tuning import choose_ways, tune_launches
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


def test_tuning_measures_rivals_and_tells_who_runs(monkeypatch, capsys) -> None:
    from fedbert_kernels import choice

    measured = []

    def measure_again(cases, device):
        measured.extend(case.name for case in cases)
        outcome = choice.Outcome("ours", {"ours": 1.0}, {"other": "not installed"}, {}, "")
        return {measured[0]: outcome}

    monkeypatch.setattr(choice, "measure_again", measure_again)
    found = choose_ways(("layer norm", "GELU"), ((2, 64),), (256,), torch.bfloat16, CPU)
    assert measured == ["layer norm bfloat16 256", "layer norm bfloat16 256 dropout", "GELU bfloat16 1024"]
    assert found == [
        {"case": measured[0], "chosen": "ours", "milliseconds": {"ours": 1.0}, "left_out": {"other": "not installed"}}
    ]
    assert capsys.readouterr().out == f"{measured[0]}: ours runs on this card from now on\n"
    measured.clear()
    choose_ways(KERNELS, ((2, 64), (8, 128)), (256,), torch.bfloat16, CPU)
    assert len(measured) == 2 * 3 * 2 + 3
    assert measured[1] == "attention bfloat16 2 x 64 dropout up to 128"
