"""Tile shape and options of a kernel launch, and the file of the fastest ones measured on a card.

Nothing is timed here (see `attention_tuning.py`). A file that is absent, unreadable, or measured
with another release of Triton or other kernels is ignored: the shapes written beside the kernels
are used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

GAIN = 0.97
"""A candidate must take less than this share of the default's time; smaller gains are noise."""


@dataclass(frozen=True)
class Launch:
    """Tile shape and launch options of one kernel."""

    rows: int
    columns: int
    warps: int
    stages: int
    registers: int | None = None
    """Registers of a thread, where the compiler must be told that it may use them all."""
    hide_zero: bool = True
    """Hide from the compiler that dropped elements become zero.

    Before Blackwell it would otherwise select after rounding to 16 bits, with twice the
    instructions.
    """

    @property
    def options(self) -> dict[str, int | bool]:
        # Explicit, because Triton's default for fused multiply-add changes between releases.
        options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}
        return options if self.registers is None else options | {"maxnreg": self.registers}


def fastest(default: Launch, candidates: Iterable[Launch], seconds: Callable[[Launch], float]) -> tuple[Launch, float]:
    """(launch to use, its share of the default's time): the fastest candidate if clearly faster.

    Else `default`. A candidate for which `seconds` raises (does not compile, does not fit the card,
    is wrong) is skipped.
    """
    limit = seconds(default)
    best, best_seconds = default, limit
    for candidate in candidates:
        if candidate == default:
            continue
        try:
            taken = seconds(candidate)
        except Exception:  # Compilers and drivers fail in many ways; all mean that it cannot run.
            continue
        if taken < min(best_seconds, GAIN * limit):
            best, best_seconds = candidate, taken
    return best, best_seconds / limit


def table_path(card: str, capability: int, triton_version: str) -> Path:
    """File of one card's and Triton release's launches: under $XDG_CACHE_HOME, or ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    slug = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    return Path(cache) / "fedbert-ds" / "launches" / f"{slug}-sm{capability}-triton-{triton_version}.json"


def digest(*sources: str | Path) -> str:
    """Digest of kernel sources: a launch that suits other code may spill or be slow for this."""
    return hashlib.sha256(b"".join(Path(source).read_bytes() for source in sources)).hexdigest()[:16]


def read_table(path: Path, kernels: str) -> dict[str, Launch]:
    """{shape class: launch} written for the kernels with this digest; empty if there is none."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if table["kernels"] != kernels:
            return {}
        return {name: Launch(**launch) for name, launch in table["launches"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def write_table(path: Path, kernels: str, launches: Mapping[str, Launch]) -> None:
    """Add launches to the file atomically; those of other kernels are removed."""
    merged = read_table(path, kernels) | dict(launches)
    write_json(path, {"kernels": kernels, "launches": {name: asdict(merged[name]) for name in sorted(merged)}})


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Write the file atomically; OSError if it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8") as scratch:
        json.dump(value, scratch, indent=1)
    os.replace(scratch.name, path)
