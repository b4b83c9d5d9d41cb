"""Experiment trackers, by the classes of accelerate: TensorBoard, Weights & Biases and others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedbert_ds.errors import ConfigError
from fedbert_ds.telemetry.evaluations import Evaluation
from fedbert_ds.telemetry.metrics import WindowMetrics

PROJECT = "fedbert-ds"

Tell = Callable[[str], None]


class Trackers:
    """Logs to every tracker. One that fails is told of once and left out: a run does not end for
    its tracker.
    """

    def __init__(self, trackers: Mapping[str, Any], tell: Tell) -> None:
        self._trackers = dict(trackers)
        self._tell = tell

    @classmethod
    def open(cls, names: Sequence[str], folder: Path, settings: Mapping[str, Any], tell: Tell) -> Trackers:
        """Start these trackers; files go under `folder`. `settings` is the run file as a tree,
        `tell` takes a line for the user. ConfigError as `check_trackers`.
        """
        check_trackers(names)
        if not names:
            return cls({}, tell)
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # accelerate's own log lines need it
        trackers = {}
        for name in names:
            kind = LOGGER_TYPE_TO_CLASS[name]
            # accelerate would ask which process this is; only rank 0 comes here.
            here = type(kind.__name__, (kind,), {"main_process_only": False})
            where = {"logging_dir": str(folder)} if kind.requires_logging_directory else {}
            trackers[name] = here(PROJECT, **where)
        opened = cls(trackers, tell)
        opened._each(lambda one: one.start())
        opened._each(lambda one: one.store_init_configuration(flat(settings)))
        return opened

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers by name, of this window."""
        self._each(lambda tracker: tracker.log(dict(values), step=step))

    def close(self) -> None:
        """End every tracker's run."""
        self._each(lambda tracker: tracker.finish())

    def _each(self, call: Callable[[Any], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                call(tracker)
            except Exception as error:  # services, networks and disks have their own
                del self._trackers[name]
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                self._tell(f"warning {name} gets nothing any more: {reason} (run.trackers)")


def check_trackers(names: Sequence[str]) -> None:
    """ConfigError for a tracker that accelerate does not know or whose package is not installed."""
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    there = {str(one) for one in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ConfigError(f"run.trackers: {name} is no tracker; choose {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")
        if name not in there:
            raise ConfigError(f"run.trackers: {name} is not installed; pip install {name}, or remove it")


def of_window(metrics: WindowMetrics) -> dict[str, float]:
    """What is logged of a window."""
    return {
        "loss": metrics.loss,
        "learning_rate": metrics.learning_rate,
        "tokens": float(metrics.tokens),
        "tokens_per_second": metrics.tokens / metrics.seconds if metrics.seconds else 0.0,
        "busy_share": metrics.busy_seconds / metrics.seconds if metrics.seconds else 0.0,
        "bytes_per_token": metrics.wire_bytes / metrics.tokens if metrics.tokens else 0.0,
        "lost_masked_tokens": float(metrics.lost_masked_tokens),
        "clients": float(metrics.clients),
    }


def of_evaluation(evaluation: Evaluation) -> dict[str, float]:
    """What is logged of an evaluation: mean, worst client, every client, a task's measures."""
    if evaluation.worst is None:
        return {}
    return {
        "held_out/loss": evaluation.loss,
        "held_out/worst": evaluation.clients[evaluation.worst].loss,
        **{f"held_out/clients/{name}": one.loss for name, one in evaluation.clients.items()},
        **{f"held_out/{name}": value for name, value in evaluation.measures.items()},
    }


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted name; what is no plain value is its text."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return found
