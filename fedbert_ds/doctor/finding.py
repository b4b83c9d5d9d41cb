"""One thing that the doctor looked at: fine, worth knowing, or in the way; and what to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from fedbert_ds.errors import UserError, one_line

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """A line for the user."""

    level: Level
    about: str
    """A word or two."""
    says: str
    remedy: str = ""

    @property
    def line(self) -> str:
        """As it is printed; one line, whatever names and files say."""
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{self.level:<4}  " + one_line(f"{self.about}: {self.says}{remedy}")

    @property
    def is_in_the_way(self) -> bool:
        """Whether a run would stop here."""
        return self.level == "fail"


def ok(about: str, says: str) -> Finding:
    """Nothing to mend."""
    return Finding("ok", about, says)


def warning(about: str, says: str, remedy: str) -> Finding:
    """The run goes on; its user may want to know."""
    return Finding("warn", about, says, remedy)


def fault(about: str, says: str, remedy: str) -> Finding:
    """It would stop the run."""
    return Finding("fail", about, says, remedy)


def of_error(about: str, error: UserError, otherwise: str = "") -> Finding:
    """A fault, from an error whose remedy stands behind its first semicolon; `otherwise` is that of
    an error that has none.
    """
    says, _, remedy = str(error).partition("; ")
    return Finding("fail", about, says, remedy or otherwise)


def tried(about: str, check: Callable[[], Any], says: str, otherwise: str = "") -> Finding:
    """What a check of the run's own finds: `says` where it raises no UserError, else as above."""
    try:
        check()
    except UserError as error:
        return of_error(about, error, otherwise)
    return ok(about, says)
