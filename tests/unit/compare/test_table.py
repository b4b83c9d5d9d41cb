"""The table, the verdict and the picture of rows whose numbers are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedbert_ds.compare.table import draw, grouped, owner_means, table, task_means, verdict, with_spread

COSTS = {
    "bytes_per_token": 2067.4,
    "client_flops_per_token": 2.16e6,
    "client_peak_memory_mb": 512,
    "seconds": 125.0,
    "seconds_in_windows": 61.0,
}


def row(
    system: str, ward: float, lab: float, seed: int = 1, every: int | None = None, trained: bool = True, **more: Any
) -> dict[str, Any]:
    losses = {"ward": ward, "lab": lab}
    return {
        "system": system,
        "average_every": every,
        "seed": seed,
        "held_out": losses,
        "held_out_loss": (ward + lab) / 2,
        "worst_client": max(losses, key=lambda name: losses[name]),
        **(COSTS if trained else {}),
        **more,
    }


ROWS = [
    row("word frequency", 7.0, 6.5, trained=False),
    row("centralized", 5.0, 5.5, glue={"RTE": [0.5, 0.6]}),
    row("alone", 5.2, 5.8),
    row("synchronous", 5.0, 5.5, glue={"RTE": [0.55, 0.65]}),
    row("fedavg", 5.1, 5.9, every=20, glue={"RTE": [0.5, 0.5]}),
]


def test_table() -> None:
    assert table(ROWS).splitlines() == [
        "| system | held-out loss | worst client | ward | lab | RTE | bytes per token | client FLOP per token "
        "| client peak memory | wall time | in windows |",
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: |",
        "| word frequency | 6.750 | 7.000 | 7.000 | 6.500 |  |  |  |  |  |  |",
        "| centralized | 5.250 | 5.500 | 5.000 | 5.500 | 55.0 ± 7.1 | 2,067 | 2.16 M | 512 MB | 2:05 | 1:01 |",
        "| alone | 5.500 | 5.800 | 5.200 | 5.800 |  | 2,067 | 2.16 M | 512 MB | 2:05 | 1:01 |",
        "| synchronous | 5.250 | 5.500 | 5.000 | 5.500 | 60.0 ± 7.1 | 2,067 | 2.16 M | 512 MB | 2:05 | 1:01 |",
        "| fedavg, average every 20 | 5.500 | 5.900 | 5.100 | 5.900 | 50.0 ± 0.0 | 2,067 | 2.16 M | 512 MB "
        "| 2:05 | 1:01 |",
    ]


def test_several_seeds_are_a_mean_and_a_sample_spread() -> None:
    rows = [row("synchronous", 5.0, 4.0), row("synchronous", 6.0, 4.0, seed=2)]
    (line,) = table(rows).splitlines()[2:]
    assert line.startswith("| synchronous | 4.750 ± 0.354 | 5.500 ± 0.707 | 5.500 ± 0.707 | 4.000 ± 0.000 | 2,067 |")
    rates = [row("diloco", 5.0, 4.0, every=2, server_lr=rate) for rate in (None, 0.1, 0.7)]
    assert list(grouped(rates)) == [
        "diloco, average every 2", "diloco, average every 2, server_lr 0.1", "diloco, average every 2, server_lr 0.7",
    ]  # fmt: skip
    assert owner_means(rows) == {"ward": 5.5, "lab": 4.0} and len(grouped(rows)) == 1
    assert with_spread([1.0], 2) == "1.00"


def test_the_verdict_names_whom_a_system_does_not_help() -> None:
    assert verdict(ROWS) == [
        "Better than alone for every owner: centralized; synchronous.",
        "Not better than alone: fedavg, average every 20 for lab (5.900, alone 5.800).",
    ]
    share = [row("alone-share", 5.3, 6.0)]
    assert verdict([*ROWS, *share])[2:] == [
        "Better than alone-share for every owner: centralized; synchronous; fedavg, average every 20."
    ]
    assert verdict([one for one in ROWS if one["system"] != "alone"]) == []


def test_equal_or_no_number_is_not_better() -> None:
    rows = [row("alone", 5.0, 5.0), row("synchronous", 5.0, float("nan"))]
    assert verdict(rows) == [
        "Better than alone for every owner: none.",
        "Not better than alone: synchronous for ward (5.000, alone 5.000), lab (nan, alone 5.000).",
    ]


def test_the_verdict_is_by_means_over_seeds() -> None:
    rows = [row("alone", 5.0, 5.0), row("alone", 5.4, 5.4, seed=2)]
    rows += [row("synchronous", 5.1, 5.0), row("synchronous", 5.1, 5.0, seed=2)]
    assert verdict(rows) == ["Better than alone for every owner: synchronous."]


@pytest.mark.parametrize("seeds", [1, 3])
def test_picture(tmp_path: Path, seeds: int) -> None:
    path = tmp_path / "table.png"
    draw(path, [one | {"seed": seed} for one in ROWS for seed in range(seeds)])
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_figure_that_no_row_has_is_no_column() -> None:
    rows = [row("word frequency", 7.0, 6.5, trained=False), row("synchronous", 5.0, 5.5)]
    assert "cosine" not in table(rows)
    head, _, *lines = table([rows[0], rows[1] | {"word_cosine": 0.126}]).splitlines()
    assert " | lab | cosine of words | bytes per token |" in head
    assert "| 6.500 |  |  |" in lines[0] and "| 5.500 | 0.13 | 2,067 |" in lines[1]


UNTRAINED = row("not pre-trained", 8.0, 8.0, trained=False, glue={"RTE": [0.5, 0.5], "SST-2": [0.7, 0.8]})


def test_several_tasks_have_a_mean_and_it_is_of_all_of_them() -> None:
    both = row("synchronous", 5.0, 5.5, glue={"RTE": [0.6, 0.5], "SST-2": [0.8, 0.9]})
    one = row("fedavg", 5.1, 5.9, every=20, glue={"RTE": [0.5, 0.5]})
    head, _, *lines = table([UNTRAINED, both, one]).splitlines()
    assert " | lab | RTE | SST-2 | mean of tasks | bytes per token |" in head
    assert [line.split(" | ")[5:8] for line in lines] == [
        ["50.0 ± 0.0", "75.0 ± 7.1", "62.5"], ["55.0 ± 7.1", "85.0 ± 7.1", "70.0"], ["50.0 ± 0.0", "", ""],
    ]  # fmt: skip
    again = row("synchronous", 5.0, 5.5, seed=2, glue={"RTE": [0.4, 0.5], "SST-2": [1.0, 0.9]})
    assert task_means([both, again]) == pytest.approx({"RTE": 50.0, "SST-2": 90.0})


def test_the_verdict_names_the_tasks_that_pre_training_does_not_help() -> None:
    rows = [
        UNTRAINED,
        row("centralized", 5.0, 5.5, glue={"RTE": [0.6, 0.5], "SST-2": [0.8, 0.9]}),
        row("synchronous", 5.0, 5.5, glue={"RTE": [0.4, 0.5], "SST-2": [0.8, 0.7]}),
        row("synchronous", 5.0, 5.5, seed=2, glue={"RTE": [0.6, 0.5], "SST-2": [0.8, 0.9]}),
        row("fedavg", 5.1, 5.9, every=20, glue={"RTE": [0.4, 0.5], "SST-2": [0.8, 0.7]}),
    ]
    assert verdict(rows) == [
        "Better than no pre-training on every task: centralized.",
        "Not better than no pre-training: synchronous on RTE (50.0, not pre-trained 50.0).",
        "Not better than no pre-training: fedavg, average every 20 on RTE (45.0, not pre-trained 50.0), SST-2 (75.0, "
        "not pre-trained 75.0).",
    ]
    assert verdict([UNTRAINED, row("muloco", 5.1, 5.9, every=20, glue={"RTE": [1.0]})]) == verdict([UNTRAINED])
    assert verdict([UNTRAINED]) == ["Better than no pre-training on every task: none."]
