"""A run's checkpoints, a folder a window: which count, which are whole, and room for the next."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedbert_ds.atomic_write import sync, write_text
from fedbert_ds.errors import RunError
from fedbert_ds.seals import damage_of, seals_of, sync_tree

KEPT = 2
COMPLETE = "complete.json"
SPARE = 1.05
"""Free space that a save asks for, as a multiple of the last one's size."""


@dataclass(frozen=True)
class Layout:
    """How a checkpoint of the body is divided among files."""

    ranks: int
    zero_stage: int


@dataclass(frozen=True)
class CheckpointFolder:
    """DeepSpeed's files, the client model and a mark for each saved window.

    A checkpoint is written as a draft. Its mark, with size and hash of every file, comes last; then
    it takes its place. So nothing that counts is ever written to, and what counts is on disk.
    """

    path: Path

    def of(self, window: int) -> Path:
        """Folder of the state before `window`."""
        return self.path / f"window-{window}"

    @property
    def draft(self) -> CheckpointFolder:
        """Where a save writes."""
        return CheckpointFolder(self.path / "draft")

    @property
    def undone(self) -> CheckpointFolder:
        """Checkpoints that a run has gone back behind, until it has a new one."""
        return CheckpointFolder(self.path / "undone")

    def client_model(self, window: int) -> Path:
        """The reference client model before `window`, and where each client stands in its text."""
        return self.of(window) / "client_model.safetensors"

    def complete_windows(self) -> frozenset[int]:
        """Windows with a complete checkpoint."""
        return frozenset(int(mark.parent.name.removeprefix("window-")) for mark in self._marks())

    def whole_windows(self, tell: Callable[[str], None]) -> frozenset[int]:
        """Those whose files are as they were saved; reads them all. `tell` hears of others.

        RunError if there are checkpoints and none is whole.
        """
        problems = {window: self.damage(window) for window in sorted(self.complete_windows())}
        for window, problem in problems.items():
            if problem is not None:
                tell(f"{self.of(window)}: {problem}; it is left aside")
        whole = frozenset(window for window, problem in problems.items() if problem is None)
        if problems and not whole:
            window = max(problems)
            raise RunError(
                f"{self.of(window)}: {problems[window]}, and no other checkpoint is whole; restore {self.path}, or "
                "start anew in another run.directory"
            )
        return whole

    def damage(self, window: int) -> str | None:
        """What is wrong with a complete checkpoint, as a phrase; None if it is as it was saved, or
        was saved before there were hashes.
        """
        try:
            return damage_of(self.of(window), self._mark(window).get("files", {}))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return f"{COMPLETE} cannot be read"

    def layout(self, window: int) -> Layout:
        """How a complete checkpoint is divided; RunError if its mark does not say so."""
        try:
            mark = self._mark(window)
            return Layout(int(mark["ranks"]), int(mark["zero_stage"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{self.of(window) / COMPLETE}: says not by how many ranks and at which ZeRO stage this was saved "
                f'({error!r}); add "ranks" and "zero_stage" to it'
            ) from error

    def mark_complete(self, window: int, layout: Layout) -> None:
        """Seal and mark the draft of `window` and let it take its place; delete all but the newest
        two, and what was undone.

        All its parts are written already. On disk when this returns.
        """
        draft = self.draft.of(window)
        sync_tree(draft)
        mark = {"window": window, "ranks": layout.ranks, "zero_stage": layout.zero_stage, "files": seals_of(draft)}
        write_text(draft / COMPLETE, json.dumps(mark))
        if self.of(window).exists():
            self.set_aside(window)
        draft.replace(self.of(window))
        sync(self.path)
        shutil.rmtree(self.draft.path, ignore_errors=True)
        shutil.rmtree(self.undone.path, ignore_errors=True)
        for old in sorted(self.complete_windows())[:-KEPT]:
            self._remove(old)

    def begin_at(self, window: int) -> None:
        """Put aside what a run that begins here will write again, and delete what never came to be
        complete.

        Whoever made the run go back may have been wrong, so later checkpoints stay until there is a
        new one.
        """
        shutil.rmtree(self.draft.path, ignore_errors=True)
        complete = self.complete_windows()
        for path in self.path.glob("window-*"):
            number = path.name.removeprefix("window-")
            if not number.isdecimal():
                continue
            if int(number) not in complete:
                shutil.rmtree(path)
            elif int(number) > window:
                self.set_aside(int(number))

    def set_aside(self, window: int) -> None:
        """Let a checkpoint count no more."""
        place = self.undone.of(window)
        if place.exists():
            shutil.rmtree(place)
        place.parent.mkdir(parents=True, exist_ok=True)
        self.of(window).replace(place)
        sync(self.path)

    def make_room(self, estimate: int) -> str | None:
        """Look for space for another checkpoint, of the newest one's size, or of `estimate` bytes
        for the first; the older of two goes if it must. What is missing, in one line, or None.
        """
        windows = sorted(self.complete_windows())
        needed = round(SPARE * (_size(self.of(windows[-1])) if windows else estimate))
        if self._free() < needed and len(windows) > 1:
            for old in windows[:-1]:
                self._remove(old)
        free = self._free()
        if free >= needed:
            return None
        return (
            f"{self.path}: {free / 1e6:,.0f} MB are free and a checkpoint takes {needed / 1e6:,.0f} MB; free some "
            "space or move the run's folder, then add --resume"
        )

    def _free(self) -> int:
        place = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        return shutil.disk_usage(place).free

    def _remove(self, window: int) -> None:
        # The mark goes first: a half-deleted checkpoint must not count.
        (self.of(window) / COMPLETE).unlink(missing_ok=True)
        shutil.rmtree(self.of(window))

    def _mark(self, window: int) -> Any:
        return json.loads((self.of(window) / COMPLETE).read_text(encoding="utf-8"))

    def _marks(self) -> list[Path]:
        return list(self.path.glob(f"window-*/{COMPLETE}"))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
