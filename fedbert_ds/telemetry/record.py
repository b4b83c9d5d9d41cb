"""The file every benchmark writes: command, commit, machine, versions, and one line per row."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fedbert_ds.atomic_write import write_text

SOURCE = Path(__file__).resolve().parents[2]
"""The source tree, when the package is run from one."""

RECORDS = "benchmarks/results"
"""Where records are, which are no source: one may get rows from several runs."""

PACKAGES = ("fedbert-ds", "torch", "deepspeed", "transformers")

Row = Mapping[str, Any]


def write_record(path: Path, *, command: str, commit: str | None, rows: Sequence[Row], **more: Any) -> dict[str, Any]:
    """Write and return {command, commit, machine, versions, ...more, rows} as JSON."""
    record = {
        "command": command, "commit": commit, "machine": machine(), "versions": versions(), **more, "rows": list(rows),
    }  # fmt: skip
    write_text(path, _readable(record))
    return record


def command_line(program: str = "fedbert-ds") -> str:
    """The command that runs now, as one would type it; `program` comes before its arguments."""
    return f"{program} {shlex.join(sys.argv[1:])}"


def source_commit() -> str | None:
    """The source tree's commit, `-dirty` if tracked files differ, records apart; None outside a git
    checkout.
    """
    git = ["git", "-C", str(SOURCE)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=30)
        status = [*git, "status", "--porcelain", "--untracked-files=no", "--", ".", f":!{RECORDS}"]
        changed = subprocess.run(status, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("-dirty" if changed else "")


def machine() -> dict[str, Any]:
    """Processor, usable cores, memory, operating system; no names of hosts or users."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": _memory_gb(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str | None]:
    """Versions of Python and of what the figures depend on; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)
    except (AttributeError, OSError, ValueError):
        return None


def _readable(record: Mapping[str, Any]) -> str:
    """Indented JSON, but each entry of a list on one line."""
    fields = []
    for name, value in record.items():
        if isinstance(value, list) and value:
            text = "[\n" + ",\n".join(f"    {json.dumps(entry)}" for entry in value) + "\n  ]"
        else:
            text = json.dumps(value, indent=2).replace("\n", "\n  ")
        fields.append(f"  {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(fields) + "\n}\n"
