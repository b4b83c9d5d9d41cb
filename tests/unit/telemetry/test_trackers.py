"""Trackers get what the metrics file gets; one that fails is left out, and the run goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate import tracking
from unit.telemetry.test_metrics import ROW

from fedbert_ds.errors import ConfigError
from fedbert_ds.telemetry.evaluations import HeldOutLoss, evaluation_of
from fedbert_ds.telemetry.trackers import PROJECT, Trackers, check_trackers, flat, of_evaluation, of_window

KNOWN: list[Any] = []


class Recorded(tracking.GeneralTracker):
    """What a service would get."""

    name = "recorded"
    requires_logging_directory = True

    def __init__(self, run_name: str, logging_dir: str) -> None:
        super().__init__()
        self.told: list[Any] = [("init", run_name, logging_dir)]
        KNOWN.append(self)

    @property
    def tracker(self) -> Any:
        return self

    @tracking.on_main_process
    def start(self) -> None:
        self.told.append("start")

    @tracking.on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.told.append(("settings", values))

    @tracking.on_main_process
    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        self.told.append((step, values))

    @tracking.on_main_process
    def finish(self) -> None:
        self.told.append("finish")


class Failing(Recorded):
    """A service that cannot be reached any more."""

    name = "failing"

    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        raise OSError("no route to host\nand more")


@pytest.fixture(autouse=True)
def services(monkeypatch: pytest.MonkeyPatch) -> None:
    KNOWN.clear()
    for kind in (Recorded, Failing):
        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, kind.name, kind)
    monkeypatch.setattr(tracking, "_available_trackers", ["recorded", "failing"])


def test_a_tracker_hears_settings_numbers_and_the_end(tmp_path: Path) -> None:
    trackers = Trackers.open(["recorded"], tmp_path, {"run": {"seed": 3, "directory": Path("x")}}, print)
    trackers.log({"loss": 2.5}, 7)
    trackers.close()
    (one,) = KNOWN
    settings = {"run.seed": 3, "run.directory": "x"}
    assert one.told == [
        ("init", PROJECT, str(tmp_path)), "start", ("settings", settings), (7, {"loss": 2.5}), "finish",
    ]  # fmt: skip


def test_one_that_fails_is_told_of_once_and_left_out(tmp_path: Path) -> None:
    lines: list[str] = []
    trackers = Trackers.open(["failing", "recorded"], tmp_path, {}, lines.append)
    for window in range(3):
        trackers.log({"loss": 1.0}, window)
    trackers.close()
    assert lines == ["warning failing gets nothing any more: no route to host (run.trackers)"]
    assert KNOWN[1].told[-4:] == [(0, {"loss": 1.0}), (1, {"loss": 1.0}), (2, {"loss": 1.0}), "finish"]
    assert "finish" not in KNOWN[0].told


def test_without_trackers_nothing_happens(tmp_path: Path) -> None:
    trackers = Trackers.open([], tmp_path, {}, print)
    trackers.log({"loss": 1.0}, 0)
    trackers.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tensorbored", "run.trackers: tensorbored is no tracker; choose aim, "),
        ("wandb", "wandb is not installed; pip install"),
    ],
)
def test_a_tracker_that_is_not_there_is_one_line(name: str, message: str) -> None:
    check_trackers(["recorded"])
    with pytest.raises(ConfigError, match=message):
        check_trackers(["recorded", name])


def test_numbers_of_a_window_are_those_of_its_metrics() -> None:
    metrics = replace(ROW, loss=2.0, tokens=100, seconds=4.0, busy_seconds=1.0, bytes_up=300, bytes_down=100,
                      update_bytes_up=50, update_bytes_down=50)  # fmt: skip
    logged = of_window(metrics)
    assert (logged["loss"], logged["tokens_per_second"], logged["busy_share"]) == (2.0, 25.0, 0.25)
    assert logged["bytes_per_token"] == 5.0 and logged["learning_rate"] == metrics.learning_rate
    assert of_window(replace(metrics, seconds=0.0, tokens=0))["tokens_per_second"] == 0.0


def test_numbers_of_an_evaluation_name_every_client() -> None:
    losses = {"ada": HeldOutLoss(2.0, 1, (1.0,)), "bo": HeldOutLoss(3.0, 3, (2.0,))}
    evaluation = evaluation_of(5, losses, ["ada", "bo"], lambda counts: {"accuracy": counts[0] / 4})
    assert of_evaluation(evaluation) == {
        "held_out/loss": 1.25, "held_out/worst": 2.0, "held_out/clients/ada": 2.0, "held_out/clients/bo": 1.0,
        "held_out/accuracy": 0.75,
    }  # fmt: skip
    assert of_evaluation(evaluation_of(5, {}, ["ada"])) == {}


def test_settings_are_flat_and_plain() -> None:
    assert flat({"a": {"b": 1, "c": {"d": None}}, "e": [1, 2], "f": True}) == {
        "a.b": 1, "a.c.d": "None", "e": "[1, 2]", "f": True,
    }  # fmt: skip


def test_tensorboard_writes_what_it_reads_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(tracking, "_available_trackers", ["tensorboard"])
    trackers = Trackers.open(["tensorboard"], tmp_path, {"run": {"seed": 3}}, print)
    trackers.log({"loss": 2.5}, 7)
    trackers.close()
    events = EventAccumulator(str(tmp_path / PROJECT)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(7, 2.5)]
