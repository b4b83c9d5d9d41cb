"""Files by number in a folder, the newest two kept, each with its seal beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedbert_ds.atomic_write import atomic_write, write_text
from fedbert_ds.errors import RunError
from fedbert_ds.seals import Seal, damage_of, seal_of

KEPT = 2
SEAL = ".seal.json"
"""Behind a file's name: the file that holds its size and hash."""


@dataclass(frozen=True)
class NumberedFiles:
    """The files `PREFIX-NUMBER SUFFIX` of a folder; others there are left alone."""

    folder: Path
    prefix: str
    suffix: str

    def of(self, number: int) -> Path:
        """Path of one file, there or not."""
        return self.folder / f"{self.prefix}-{number}{self.suffix}"

    def numbers(self) -> tuple[int, ...]:
        """What is there, ascending."""
        names = (path.name.removesuffix(self.suffix) for path in self.folder.glob(f"{self.prefix}-*{self.suffix}"))
        found = (name.removeprefix(f"{self.prefix}-") for name in names)
        return tuple(sorted(int(number) for number in found if number.isdecimal()))

    def save(self, number: int, write: Callable[[Path], object]) -> None:
        """Let `write` write a file, whole or not at all; on disk when this returns.

        Later files go, and all but the newest KEPT: whoever saves went back behind those.
        """
        path = self.of(number)
        with atomic_write(path) as partial:
            write(partial)
            # Of a file of that number from before, too: this process may die before it is replaced.
            write_text(self._seal(number), json.dumps([seal_of(partial), *self._before(number)]))
        self.begin_at(number)
        for old in self.numbers()[:-KEPT]:
            self._remove(old)

    def begin_at(self, number: int) -> None:
        """Delete later files."""
        for later in self.numbers():
            if later > number:
                self._remove(later)

    def damage(self, number: int) -> str | None:
        """What is wrong with a file, as a phrase; None if it is as saved, or has no seal."""
        problem = None
        try:
            for seal in self._seals(number):
                problem = damage_of(self.folder, {self.of(number).name: seal})
                if problem is None:
                    break
        except (OSError, ValueError, KeyError, TypeError):
            return f"{self._seal(number).name} cannot be read"
        return problem

    def whole(self, tell: Callable[[str], None]) -> tuple[int, ...]:
        """Numbers of the files that are as they were saved, ascending; `tell` hears of others.

        RunError if files are there and none is whole.
        """
        problems = {number: self.damage(number) for number in self.numbers()}
        for problem in filter(None, problems.values()):
            tell(f"{self.folder}: {problem}")
        found = tuple(number for number, problem in problems.items() if problem is None)
        if problems and not found:
            raise RunError(f"{self.folder}: {problems[max(problems)]}, and nothing older is left; restore this folder")
        return found

    def _remove(self, number: int) -> None:
        self.of(number).unlink(missing_ok=True)
        self._seal(number).unlink(missing_ok=True)

    def _before(self, number: int) -> list[Seal]:
        """The seal of a file that is about to be replaced."""
        try:
            return self._seals(number)[:1] if self.of(number).is_file() else []
        except (OSError, ValueError, TypeError):
            return []  # of a file that counts as damaged anyway

    def _seals(self, number: int) -> list[Seal]:
        """What the file may be; nothing of one that was saved before there were seals."""
        path = self._seal(number)
        return list(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else []

    def _seal(self, number: int) -> Path:
        return self.folder / f"{self.of(number).name}{SEAL}"
