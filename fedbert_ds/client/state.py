"""A client's own checkpoints, where halves are personal: one sealed file a window, of one run.

The newest two are kept. A file beside them names the run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fedbert_ds.atomic_write import write_text
from fedbert_ds.errors import RunError, writes
from fedbert_ds.numbered_files import NumberedFiles

RUN = "run.txt"
"""Holds the id of the run that the states belong to."""


def run_of(folder: Path) -> str:
    """Id of the run whose states are in `folder`; empty if none has claimed it."""
    try:
        return (folder / RUN).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def claim(folder: Path, run: str) -> None:
    """Keep `folder` for the states of this run; RunError, before anything is written, if it has
    states of another one, or of a run without a name.
    """
    if run_of(folder) == run:
        return
    if saved_windows(folder):
        raise RunError(f"{folder}: holds states of another run; give another --state folder, or remove this one")
    write_text(folder / RUN, run + "\n")


def save_state(folder: Path, window: int, state: dict[str, Any]) -> None:
    """Write the state before `window`, whole or not at all; keep the newest two.

    Later states go: the run went back behind them, and trains their windows again. RunError where
    the disk takes no more.
    """
    with writes(folder):
        _states(folder).save(window, lambda path: torch.save(state, path))


def load_state(folder: Path, window: int) -> dict[str, Any]:
    """The state before `window`, on the CPU; RunError if it is missing or damaged.

    Code in the file does not run.
    """
    path = _states(folder).of(window)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        raise RunError(
            f"{path}: cannot be read ({type(error).__name__}); give the --state folder of the first run"
        ) from error


def saved_windows(folder: Path) -> tuple[int, ...]:
    """Windows with a state in `folder`, ascending."""
    return _states(folder).numbers()


def whole_windows(folder: Path, tell: Callable[[str], None]) -> tuple[int, ...]:
    """Those whose state is as it was saved; `tell` hears of others. RunError if none of them is."""
    return _states(folder).whole(tell)


def _states(folder: Path) -> NumberedFiles:
    return NumberedFiles(folder, "state", ".pt")
