"""A client's checkpoint: its half, its optimizer, its place in the text; the newest few are kept."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from fedbert_ds.errors import RunError

KEPT_STATES = 2


def save_state(folder: Path, window: int, state: dict[str, Any]) -> None:
    """Write the state before `window`, whole or not at all, then drop all but the newest states."""
    folder.mkdir(parents=True, exist_ok=True)
    path = _path(folder, window)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    for old in sorted(saved_windows(folder))[:-KEPT_STATES]:
        _path(folder, old).unlink()


def load_state(folder: Path, window: int) -> dict[str, Any]:
    """The state before `window`; RunError when it is missing or damaged."""
    path = _path(folder, window)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise RunError(
            f"{path}: cannot be read ({type(error).__name__}); give the --state folder of the first run"
        ) from error


def saved_windows(folder: Path) -> tuple[int, ...]:
    """Windows whose state lies in `folder`, ascending."""
    numbers = (path.stem.removeprefix("state-") for path in folder.glob("state-*.pt"))
    return tuple(sorted(int(number) for number in numbers if number.isdecimal()))


def _path(folder: Path, window: int) -> Path:
    return folder / f"state-{window}.pt"
