"""A client's own checkpoints, where halves are personal: one file a window, the newest two kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fedbert_ds.atomic_write import atomic_write
from fedbert_ds.errors import RunError

KEPT_STATES = 2


def save_state(folder: Path, window: int, state: dict[str, Any]) -> None:
    """Write the state before `window`, whole or not at all; keep the newest KEPT_STATES."""
    with atomic_write(_path(folder, window)) as partial:
        torch.save(state, partial)
    for old in sorted(saved_windows(folder))[:-KEPT_STATES]:
        _path(folder, old).unlink()


def load_state(folder: Path, window: int) -> dict[str, Any]:
    """The state before `window`, on the CPU; RunError if it is missing or damaged.

    Code in the file does not run.
    """
    path = _path(folder, window)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        raise RunError(
            f"{path}: cannot be read ({type(error).__name__}); give the --state folder of the first run"
        ) from error


def saved_windows(folder: Path) -> tuple[int, ...]:
    """Windows with a state in `folder`, ascending."""
    numbers = (path.stem.removeprefix("state-") for path in folder.glob("state-*.pt"))
    return tuple(sorted(int(number) for number in numbers if number.isdecimal()))


def _path(folder: Path, window: int) -> Path:
    return folder / f"state-{window}.pt"
