"""A second process is kept out, a killed one lets go, and nobody else reads what is written."""

from __future__ import annotations

import os
import re
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from fedbert_ds.errors import RunError
from fedbert_ds.folder_lock import HOLDER, LOCK, check_usable, keep_private, locked, private_folder

HOLD = """
import sys, time
from pathlib import Path
from fedbert_ds.folder_lock import locked
with locked(Path(sys.argv[1]), "key"):
    print("in", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> subprocess.Popen[str]:
    """Another process that is in the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "in\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_told_who_is_in(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    who = f"process {holder.pid} on {socket.gethostname()}"
    for _ in range(2):
        with pytest.raises(RunError) as caught, locked(tmp_path / "run", "run.directory"):
            raise AssertionError("it was let in")
        assert str(caught.value) == f"{tmp_path / 'run'}: in use by {who}; end that first, or set another run.directory"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_dies_lets_go(tmp_path: Path, holder: subprocess.Popen[str], how: signal.Signals) -> None:
    holder.send_signal(how)
    holder.wait()
    with locked(tmp_path / "run", "run.directory"):
        assert (tmp_path / "run" / HOLDER).read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
    assert not (tmp_path / "run" / HOLDER).exists()


def test_a_process_that_is_done_lets_go_even_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="so"), locked(tmp_path, "key"):
        raise ValueError("so")
    with locked(tmp_path, "key"):
        pass


def test_where_the_file_system_knows_no_locks_work_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: FileLock) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(FileLock, "_acquire", refuse)
    with locked(tmp_path, "key"):
        assert not (tmp_path / HOLDER).exists()


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_what_is_made_is_for_its_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with locked(tmp_path / "new" / "run", "key"):
            keep_private()
            (tmp_path / "new" / "run" / "text").write_text("a patient's")
            (tmp_path / "new" / "run" / "folder").mkdir()
    finally:
        os.umask(before)
    run = tmp_path / "new" / "run"
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (run, *run.iterdir())}
    assert modes == {"run": 0o700, "text": 0o600, "folder": 0o700, LOCK: 0o600}
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o755)
    private_folder(shared)
    assert stat.S_IMODE(shared.stat().st_mode) == 0o755, "its owner has said so"


@pytest.mark.parametrize("below", ["", "sub", "sub/deeper"])
def test_a_file_is_no_folder_and_none_lies_below_it(tmp_path: Path, below: str) -> None:
    file = tmp_path / "file"
    file.touch()
    folder = file / below if below else file
    for use in (check_usable, lambda folder, key: locked(folder, key).__enter__()):
        with pytest.raises(RunError) as caught:
            use(folder, "run.directory")
        assert str(caught.value) == (
            f"{folder}: {f'{file} ' if below else ''}is a file and no folder; set another run.directory"
        )
    assert file.read_bytes() == b"" and list(tmp_path.iterdir()) == [file]


def test_a_folder_that_may_not_be_written_to_is_told_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only disk, or another user's folder. Root may write in all but the former."""
    asked: list[Path] = []

    def access(path: Path, mode: int) -> bool:
        asked.append(path)
        return False

    monkeypatch.setattr(os, "access", access)
    with pytest.raises(
        RunError, match=rf"nothing can be written in {re.escape(str(tmp_path))}; .* set another --state"
    ):
        check_usable(tmp_path / "new" / "deeper", "--state")
    assert asked == [tmp_path]


def test_a_name_that_the_system_does_not_take_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"name too long; set another --out$|File name too long; set another --out$"):
        check_usable(tmp_path / ("x" * 5000), "--out")


def test_folders_to_be_made_are_usable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_usable(Path("runs/a"), "run.directory")
    check_usable(tmp_path, "run.directory")
    assert not list(tmp_path.iterdir())
