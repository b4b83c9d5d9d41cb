"""Makes this Linux look like Windows or macOS to Python code, as far as a client can tell.

    python other_system.py windows client --help        `fedbert-ds` as it would start there

What these systems lack is gone from `os`, `signal` and the modules that can be imported, `/proc` is
not there, and folders are not opened. `sys.platform` stays: torch would look for DLLs.
"""

from __future__ import annotations

import builtins
import functools
import io
import os
import signal
import sys
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

LACKS_MODULES = {
    "windows": ("fcntl", "grp", "pwd", "resource", "syslog", "termios", "tty"),
    "macos": (),
}
LACKS_OF_OS = {
    "windows": (
        *("chown", "fchmod", "fchown", "fork", "forkpty", "geteuid", "getgid", "getgroups", "getloadavg", "getpgid"),
        *("getuid", "killpg", "mkfifo", "nice", "posix_fallocate", "posix_fadvise", "pread", "pwrite", "sendfile"),
        *("setpgid", "setsid", "statvfs", "sysconf", "uname", "wait", "O_CLOEXEC", "O_DIRECTORY", "O_NONBLOCK"),
        *("memfd_create", "sched_getaffinity", "sched_setaffinity", "eventfd", "getrandom", "pidfd_open"),
    ),
    "macos": ("memfd_create", "sched_getaffinity", "sched_setaffinity", "eventfd", "getrandom", "pidfd_open"),
}
LACKS_OF_SIGNAL = {
    "windows": (
        *("SIGALRM", "SIGCHLD", "SIGCONT", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGQUIT", "SIGSTOP", "SIGUSR1", "SIGUSR2"),
        *("alarm", "pause", "pthread_kill", "pthread_sigmask", "setitimer", "sigwait"),
    ),
    "macos": (),
}


def pretend(system: str) -> None:
    """From now on this process is on `system`. Call it when torch and the like are imported."""
    for name in LACKS_MODULES[system]:
        sys.modules[name] = None  # type: ignore[assignment]
    _take(os, LACKS_OF_OS[system])
    _take(signal, LACKS_OF_SIGNAL[system])
    refused = ("/proc/", "/sys/") if system == "windows" else ("/proc/", "/sys/", "/dev/shm")
    for module, name in (
        (builtins, "open"),
        (io, "open"),
        (os, "open"),
        (os, "stat"),
        (os, "readlink"),
        (os, "listdir"),
    ):
        setattr(module, name, _without(getattr(module, name), refused, is_windows=system == "windows"))
    if system == "windows":
        _windows_psutil()


def _take(module: Any, names: Iterable[str]) -> None:
    for name in names:
        if hasattr(module, name):
            delattr(module, name)


def _without(function: Callable[..., Any], refused: tuple[str, ...], is_windows: bool) -> Callable[..., Any]:
    """The function for a system without some files, and (Windows) where no folder can be opened."""
    is_folder = os.path.isdir

    @functools.wraps(function)
    def call(path: Any, *arguments: Any, **more: Any) -> Any:
        text = os.fspath(path) if isinstance(path, str | os.PathLike) else ""
        # There psutil asks the system in another way.
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if isinstance(text, str) and text.startswith(refused) and not caller.startswith("psutil"):
            raise FileNotFoundError(2, "No such file or directory", text)
        if is_windows and function.__name__ == "open" and isinstance(text, str) and text and is_folder(text):
            raise PermissionError(13, "Permission denied", text)
        return function(path, *arguments, **more)

    return call


def _windows_psutil() -> None:
    """psutil's Process tells there the peak of its working set, too."""
    import psutil

    before = psutil.Process.memory_info

    def memory_info(process: psutil.Process) -> Any:
        told = before(process)
        return SimpleNamespace(rss=told.rss, peak_wset=told.rss)

    psutil.Process.memory_info = memory_info


def main(system: str) -> None:
    from fedbert_ds.client.footprint import leave_out_unused

    # As the command does before it imports the rest, for transformers looks once.
    leave_out_unused()
    # These are made for each system. Ours is what is tried.
    import accelerate  # noqa: F401
    import grpc  # noqa: F401
    import psutil  # noqa: F401
    from transformers import PreTrainedModel  # noqa: F401

    from fedbert_ds import atomic_write

    if system == "windows":
        # filelock has other code for Windows, which does not run here.
        sys.modules["filelock._unix"].os = SimpleNamespace(**vars(os))  # type: ignore[attr-defined]
    pretend(system)
    if system == "windows":
        # For the one file that asks: with another `os.name` pathlib would make paths of Windows.
        atomic_write.os = SimpleNamespace(**(vars(os) | {"name": "nt"}))  # type: ignore[assignment]
    from fedbert_ds.cli import main as fedbert_ds

    fedbert_ds()


if __name__ == "__main__":
    main(sys.argv.pop(1))
