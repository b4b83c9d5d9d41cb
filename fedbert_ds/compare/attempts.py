"""The attempts at a run that is not complete: what they were made with and took, told beside its
folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from fedbert_ds.atomic_write import write_text


@dataclass(frozen=True)
class Attempts:
    """Of one run, until it is complete."""

    settings: str
    """Fingerprint of the job."""
    commits: tuple[str, ...] = ()
    """Of the sources that made them, each once, in order; none outside a git checkout."""
    seconds: float = 0.0
    """From the start of the processes to their end, all attempts together."""

    @property
    def commit(self) -> str | None:
        """For a record."""
        return ", ".join(self.commits) or None

    def and_one_by(self, commit: str | None) -> Attempts:
        """With another attempt, of sources of this commit, that has taken no time yet."""
        commits = (*self.commits, *([commit] if commit is not None else ()))
        return Attempts(self.settings, tuple(dict.fromkeys(commits)), self.seconds)


def log_of(folder: Path) -> Path:
    """Output of the processes of a run, beside its folder."""
    return folder.with_name(f"{folder.name}.log")


def begin(folder: Path, attempts: Attempts) -> None:
    """Tell that the last of these attempts at the run in `folder` starts now."""
    write_text(_told(folder), json.dumps(asdict(attempts)))


def begun(folder: Path) -> Attempts | None:
    """The attempts at the run in `folder`, none of which runs; None where there was none."""
    told = _told(folder)
    if not told.is_file():
        return None
    known = json.loads(told.read_text(encoding="utf-8"))
    # The last one may have been killed with whoever would have told how long it took: it ran from
    # when it was told to its last word.
    log = log_of(folder)
    last = max(0.0, log.stat().st_mtime - told.stat().st_mtime) if log.is_file() else 0.0
    return Attempts(known["settings"], tuple(known["commits"]), known["seconds"] + last)


def forget(folder: Path) -> None:
    """As if there had been no attempt: the next log is a new one."""
    _told(folder).unlink(missing_ok=True)
    log_of(folder).unlink(missing_ok=True)


def _told(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.attempts.json")
