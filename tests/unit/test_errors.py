"""Errors that a user can mend: one line, own exit code, no traceback. Bugs keep theirs."""

from __future__ import annotations

import errno
import inspect
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from fedbert_ds import errors
from fedbert_ds.errors import (
    INTERRUPTED,
    NO_ROOM,
    UNUSABLE,
    ConnectionLost,
    RunError,
    ServerAway,
    UserError,
    WireError,
    exit_with,
    keeps_what_is_finished,
    one_line_errors,
    writes,
)

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, UserError)]


def test_every_kind_has_an_exit_code_of_its_own() -> None:
    codes = {kind.__name__: kind.exit_code for kind in KINDS if kind is UserError or UserError in kind.__bases__}
    assert len(set(codes.values())) == len(codes) >= 6, codes
    assert all(0 < code < 126 for code in codes.values()), "0 is success, and from 126 on a shell means something else"


@pytest.mark.parametrize("kind", [ConnectionLost, ServerAway])
def test_a_lost_server_leaves_as_any_error_of_the_wire(kind: type[UserError]) -> None:
    assert issubclass(kind, WireError) and kind.exit_code == WireError.exit_code


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_steers_no_terminal(kind: type[UserError]) -> None:
    """It may hold words of another party: colours, cursor moves, text that runs backwards."""
    message = str(kind("client \x1b[2J\x1b]0;owned\x07 \u202egnp \udc80 Köln, 東京"))
    assert message == r"client \x1b[2J\x1b]0;owned\x07 \u202egnp \udc80 Köln, 東京" and message.isprintable()


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_is_one_line(kind: type[UserError]) -> None:
    assert str(kind("a file:\n  is\tnot there;\r\n give another ")) == "a file: is not there; give another"


@pytest.mark.parametrize("kind", KINDS)
def test_a_command_prints_it_and_leaves_with_its_code(
    kind: type[UserError], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        exit_with(kind("change this"))
    assert left.value.code == kind.exit_code
    assert capsys.readouterr() == ("", "fedbert-ds: change this\n")


def test_an_entry_point_turns_errors_into_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    @one_line_errors
    def main(text: str, *, fails: bool) -> str:
        if fails:
            raise WireError(text)
        return text

    assert main("fine", fails=False) == "fine"
    with pytest.raises(SystemExit) as left:
        main("no\nserver", fails=True)
    assert left.value.code == WireError.exit_code
    assert capsys.readouterr().err == "fedbert-ds: no server\n"


def test_a_bug_keeps_its_traceback() -> None:
    @one_line_errors
    def main() -> None:
        raise KeyError("bug")

    with pytest.raises(KeyError, match="bug"):
        main()


@pytest.mark.parametrize("number", [*NO_ROOM, *UNUSABLE])
def test_a_place_that_cannot_be_used_is_one_line(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Whenever it shows, and whichever command finds it."""

    @one_line_errors
    def main() -> None:
        raise OSError(number, os.strerror(number), "runs/a/report.html")

    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == RunError.exit_code
    line = capsys.readouterr().err
    assert line.startswith(f"fedbert-ds: runs/a/report.html: {os.strerror(number)}; ") and line.count("\n") == 1
    assert ("free some space" in line) == (number in NO_ROOM)


@pytest.mark.parametrize(
    "error",
    [
        OSError("no number"),
        ConnectionResetError(errno.ECONNRESET, "reset"),
        FileNotFoundError(errno.ENOENT, "no file", "x"),
    ],
)
def test_what_may_be_a_bug_of_files_keeps_its_traceback(error: OSError) -> None:
    @one_line_errors
    def main() -> None:
        raise error

    with pytest.raises(OSError) as caught:
        main()
    assert caught.value is error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0\nframe #1"),
        Exception("No space left on device (os error 28)"),
    ],
)
def test_a_library_that_cannot_write_is_one_line_that_names_the_place(error: Exception) -> None:
    with (
        pytest.raises(RunError, match=r"^runs/a: cannot be written \(.*\); what was saved before is whole"),
        writes("runs/a"),
    ):
        raise error


@pytest.mark.parametrize("error", [RuntimeError("sizes of tensors must match"), KeyError("bug"), WireError("theirs")])
def test_any_other_error_of_a_library_stays_what_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, writes("runs/a"):
        raise error
    assert caught.value is error


def test_ctrl_c_is_one_line_and_the_exit_code_that_shells_have(capsys: pytest.CaptureFixture[str]) -> None:
    @one_line_errors
    def main(kept: bool) -> None:
        with keeps_what_is_finished() if kept else nullcontext():
            raise KeyboardInterrupt

    for kept, line in ((False, "stopped"), (True, "stopped; what is finished is kept, and the same command goes on")):
        with pytest.raises(SystemExit) as left:
            main(kept)
        assert left.value.code == INTERRUPTED == 130
        assert capsys.readouterr() == ("", f"\nfedbert-ds: {line}\n")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_every_name_is_printed_whatever_the_log_is_written_in(tmp_path: Path, encoding: str) -> None:
    arguments = ["client", "--server", "here:1", "--data", "notes/病人 é.txt", "--id", "Klinik"]
    ended = subprocess.run(
        [sys.executable, "-m", "fedbert_ds.cli", *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONIOENCODING": encoding},
        capture_output=True,
        timeout=120,
        check=False,
    )
    told = ended.stderr.decode(encoding).splitlines()
    assert ended.returncode == 3 and len(told) == 1 and told[0].startswith("fedbert-ds: notes/"), told
    assert ("病人" in told[0]) == (encoding == "utf-8")
