"""Several processes give what one gives; an error of one, or its death, is one line and ends the
rest."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest
import torch

from fedbert_ds.errors import ConfigError, ModelError, RunError
from fedbert_ds.glue.processes import devices_at_hand, run_all
from fedbert_ds.glue.recipe import Recipe
from fedbert_ds.glue.run import DataSource, Run

# Each process imports torch and transformers, which takes long on a busy machine.
pytestmark = pytest.mark.timeout(600)

RECIPE = Recipe(epochs=2, learning_rate=1e-2, batch_size=2, length=24)


def job(run: Run, out: Path, checkpoint: str, folder: Path) -> dict:
    source = DataSource(folder)
    return {
        "run": run, "out": out, "model_name": checkpoint, "settings": {}, "source": source, "recipe": RECIPE,
    }  # fmt: skip


def epochs(out: Path) -> dict[str, list]:
    return {
        str(path.relative_to(out).parent): json.loads(path.read_text())["epochs"] for path in out.rglob("result.json")
    }


def test_processes_give_what_one_process_gives(checkpoint: str, glue_files: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    runs = [Run("RTE", 0), Run("STS-B", 0)]
    told: list[Run] = []
    for name, devices in (("one", ["cpu"]), ("two", ["cpu", "cpu"])):
        jobs = [job(run, tmp_path / name, checkpoint, glue_files) for run in runs]
        run_all(jobs, devices, lambda progress: told.append(progress.run))
    assert len(epochs(tmp_path / "one")) == 2
    assert epochs(tmp_path / "one") == epochs(tmp_path / "two")
    assert set(told[-4:]) == set(runs)
    assert multiprocessing.active_children() == []


def test_an_error_of_one_process_is_raised_and_ends_the_others(
    checkpoint: str, glue_files: Path, tmp_path: Path
) -> None:
    jobs = [
        job(Run("RTE", seed), tmp_path / "out", name, glue_files)
        for seed, name in ((0, "no/where/at/all"), (1, checkpoint))
    ]
    with pytest.raises(ModelError, match="no/where/at/all"):
        run_all(jobs, ["cpu", "cpu"], lambda progress: None)
    assert multiprocessing.active_children() == []


def test_a_process_that_dies_is_one_line(checkpoint: str, glue_files: Path, tmp_path: Path) -> None:
    jobs = [job(Run("RTE", seed), tmp_path / "out", checkpoint, glue_files) for seed in (0, 1)]
    jobs[0]["source"] = Fatal()
    with pytest.raises(RunError, match="RTE seed 0: its process ended with code 7; start again"):
        run_all(jobs, ["cpu", "cpu"], lambda progress: None)
    assert multiprocessing.active_children() == []


class Fatal:
    """Data at which a process dies."""

    def read(self, task) -> None:
        os._exit(7)


@pytest.mark.parametrize(
    "gpus, device, workers, expected",
    [
        (0, None, None, ["cpu"]),
        (0, None, 3, ["cpu"] * 3),
        (2, None, None, ["cuda:0", "cuda:1"]),
        (2, "cuda", 3, ["cuda:0", "cuda:1", "cuda:0"]),
        (2, "cuda:1", 2, ["cuda:1", "cuda:1"]),
        (2, "cpu", None, ["cpu"]),
    ],
)
def test_devices(monkeypatch, gpus: int, device: str | None, workers: int | None, expected: list[str]) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert devices_at_hand(device, workers) == expected


@pytest.mark.parametrize(
    "device, workers, says",
    [("cuda", None, "--device cuda: no"), ("tpu", None, "--device tpu"), (None, 0, "--workers 0")],
)
def test_devices_that_are_not_there(device: str | None, workers: int | None, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        devices_at_hand(device, workers)
