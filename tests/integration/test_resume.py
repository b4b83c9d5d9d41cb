"""Runs resumed as they were not left: before their first checkpoint, longer, on other ranks.

Real programs, as in chaos.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from integration.chaos import MODES, train
from integration.chaos_process import Kill
from integration.cluster import CLIENTS, run_file, write_text
from integration.federation import Federation, fork_quickly

from fedbert_ds.errors import RunOver
from fedbert_ds.wire.address_file import look_up

pytestmark = pytest.mark.timeout(1200)
fork_quickly()

WINDOWS = 8
TOLERANCE = 2e-4
"""Of a loss: the order of sums differs, and AdamW divides small numbers."""


@pytest.mark.parametrize("mode", ["synchronous", "parallel"])
def test_ranks_that_die_before_the_first_checkpoint_begin_again(tmp_path: Path, mode: str) -> None:
    whole = train(tmp_path, "whole", mode, [])
    assert train(tmp_path, "killed", mode, [Kill("rank 1", "gradient", 1)]) == whole


@dataclass
class Part:
    """One start of the ranks, until they end by themselves."""

    windows: int
    ranks: int
    stage: int
    overrides: tuple[str, ...] = field(default=())


@dataclass
class Whole:
    """A run that was never stopped."""

    losses: list[float]
    folder: Path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Whole]:
    """By mode, a run of WINDOWS windows on two ranks at stage 2."""
    folder = tmp_path_factory.mktemp("whole")

    @cache
    def of(mode: str) -> Whole:
        return Whole(train_parts(folder / mode, mode, Part(WINDOWS, 2, 2)), folder / mode)

    return of


def train_parts(folder: Path, mode: str, *parts: Part, precision: str = "fp32") -> list[float]:
    """Losses of a run that is trained in these parts, each the end of a run of so many windows."""
    folder.mkdir()
    data = write_text(folder)
    tree = run_file(
        folder,
        "run",
        model={"num_hidden_layers": 2},
        run={"windows": 2, "save_every": 1000},
        window={"order": "fixed", "tokens": 400},
        body={"precision": precision},
        optimizer={"schedule": "constant", "lr": 0.003, "warmup_windows": 0},
        clients={"join_timeout": 120, "reconnect_timeout": 0.5},
        **MODES[mode],
    )  # fmt: skip
    run = Federation(folder, tree, data)
    for number, part in enumerate(parts):
        with run:
            overrides = (f"run.windows={part.windows}", f"body.zero_stage={part.stage}")
            run.start_ranks(part.ranks, *overrides, resume=number > 0)
            run.await_server()
            for client in CLIENTS:
                run.start_client(client)
            run.wait(lambda: not run.is_running, 300)
            assert run.failures() == {}, run.logs()
    rows = run.metrics()
    assert [row["window"] for row in rows] == list(range(parts[-1].windows))
    return [row["loss"] for row in rows]


@pytest.mark.parametrize("mode", ["synchronous", "parallel"])
def test_a_finished_run_goes_on_to_a_larger_number_of_windows(
    tmp_path: Path, whole: Callable[[str], Whole], mode: str
) -> None:
    """With a constant learning rate it is the longer run, bit by bit."""
    extended = train_parts(tmp_path / "extended", mode, Part(4, 2, 2), Part(WINDOWS, 2, 2))
    assert extended == whole(mode).losses


def test_a_run_goes_on_with_other_ranks_and_stages(tmp_path: Path, whole: Callable[[str], Whole]) -> None:
    parts = [Part(2, 2, 3), Part(4, 1, 0), Part(6, 2, 1), Part(WINDOWS, 1, 3)]
    expected, moved = whole("synchronous").losses, train_parts(tmp_path / "moved", "synchronous", *parts)
    assert max(abs(a - b) for a, b in zip(expected, moved, strict=True)) < TOLERANCE, (expected, moved)
    assert expected[0] - expected[-1] > 100 * TOLERANCE, "there is nothing to compare"
    with pytest.raises(RunOver):
        look_up(str(tmp_path / "moved" / "run" / "server.address"))


def test_in_parallel_mode_and_bf16_too(tmp_path: Path) -> None:
    whole = train_parts(tmp_path / "whole", "parallel", Part(6, 2, 2), precision="bf16")
    moved = train_parts(tmp_path / "moved", "parallel", Part(2, 1, 0), Part(4, 2, 3), Part(6, 2, 1), precision="bf16")
    assert max(abs(a - b) for a, b in zip(whole, moved, strict=True)) < 0.02, (whole, moved)


def test_states_of_another_run_are_refused_and_stay(tmp_path: Path, whole: Callable[[str], Whole]) -> None:
    folder = tmp_path / "second"
    folder.mkdir()
    data = write_text(folder)
    tree: dict[str, Any] = run_file(
        folder, "run", run={"windows": 2}, clients={"join_timeout": 60}, federation={"mode": "parallel"}
    )
    with Federation(folder, tree, data) as run:
        shutil.copytree(whole("parallel").folder / "state of ada", run.state("ada"))
        before = {path: path.read_bytes() for path in run.state("ada").rglob("*") if path.is_file()}
        run.start_ranks(1)
        run.await_server()
        run.start_client("ada")
        run.wait(lambda: "ada" in run.failures())
        assert "client ada has states of another run; give it another --state folder" in run.log("ada"), run.logs()
        assert {path: path.read_bytes() for path in run.state("ada").rglob("*") if path.is_file()} == before
