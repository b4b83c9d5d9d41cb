"""Errors that a user can mend: one line that says what to change, and an exit code."""

from __future__ import annotations

import errno
import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

INTERRUPTED = 130
"""Exit code of a program that Ctrl-C ended, as shells have it."""


def one_line(text: str) -> str:
    """The text in one line without control characters: it may hold words of another party, which
    must not steer the terminal of whoever reads a log.
    """
    words = " ".join(text.split())
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in words)


class UserError(Exception):
    """A mistake in input, configuration or environment that the user can mend, in one line."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class ConfigError(UserError):
    """The run file or a command-line override is wrong."""

    exit_code = 2


class DataError(UserError):
    """Text, a shard or a tokenizer is missing, empty or does not fit the model."""

    exit_code = 3


class ModelError(UserError):
    """A checkpoint or a model shape cannot be used."""

    exit_code = 4


class WireError(UserError):
    """The other side cannot be reached, or what it sent is refused."""

    exit_code = 5


class NotFinite(WireError):
    """What is to be sent is not of finite numbers."""


class ConnectionLost(WireError):
    """The server is gone, or went on without this client, which may join again."""


class ServerAway(WireError):
    """No server answers at its address, for now."""


class RunOver(ServerAway):
    """The run is complete. There is no server unless it is extended."""


class RunError(UserError):
    """The run cannot go on, or its directory does not fit."""

    exit_code = 6


class AggregatorLost(RunError):
    """The aggregator of another party is gone. The run can go on from the last checkpoint."""


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a write says where there is no more room: the disk's, the user's, a file's."""
UNUSABLE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EIO,
    errno.ESTALE,
)
"""What the system says of a place that is not what a user took it for, or that has become so."""


def of_system(error: OSError, again: str = "start again") -> RunError | None:
    """The line for a file or a folder that cannot be used; None for what may be a bug."""
    if error.errno in NO_ROOM:
        where = error.filename or "a file"
        return RunError(f"{where}: {error.strerror}; what was saved is whole: free some space, then {again}")
    if error.errno in UNUSABLE and error.filename:
        return RunError(f"{error.filename}: {error.strerror}; name another place or mend that one, then {again}")
    return None


_SIGNS = ("(os error ", "inline_container", "PytorchStreamWriter", "write failed", "iostream error")
"""In what libraries say of a file that they cannot write; the first is Rust's."""


@contextmanager
def writes(where: object) -> Iterator[None]:
    """In this block a library writes at `where`. RunError, one line, where the disk takes no more:
    of torch, safetensors and tokenizers each has a kind of its own for that.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        if not isinstance(error, OSError) and not any(sign in reason for sign in _SIGNS):
            raise
        raise RunError(
            f"{where}: cannot be written ({reason}); what was saved before is whole: free some space or mend that, "
            "then start again"
        ) from error


def exit_with(error: UserError) -> NoReturn:
    """Print the error as one line on standard error and raise SystemExit with its exit code."""
    print(f"fedbert-ds: {error}", file=sys.stderr, flush=True)
    raise SystemExit(error.exit_code)


def warn(problem: str) -> None:
    """Print one line about what the user may mend while work goes on."""
    print(f"warning {one_line(problem)}", flush=True)


def print_everything() -> None:
    """From now on a character that the output's encoding lacks is printed as its escape: a name in
    another script must not end a process whose log is ASCII.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def one_line_errors(main: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate an entry point: a UserError becomes one line and an exit code, and so do a file that
    cannot be used and Ctrl-C. A bug keeps its traceback.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        print_everything()
        try:
            return main(*args, **kwargs)
        except UserError as error:
            exit_with(error)
        except OSError as error:
            if (told := of_system(error)) is None:
                raise
            exit_with(told)
        except KeyboardInterrupt:
            _stop("stopped")

    return run


@contextmanager
def keeps_what_is_finished() -> Iterator[None]:
    """Ctrl-C in this block is told in one line: the same command goes on with what is missing."""
    try:
        yield
    except KeyboardInterrupt:
        _stop("stopped; what is finished is kept, and the same command goes on")


def _stop(line: str) -> NoReturn:
    print(f"\nfedbert-ds: {line}", file=sys.stderr, flush=True)
    raise SystemExit(INTERRUPTED) from None
