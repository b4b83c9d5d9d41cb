"""Tile shape and options of a kernel's launch, and the file that keeps the fastest ones found on a card.

Nothing is timed here (`attention_tuning.py` does that). A file that is absent, cannot be read, or was measured with
another release of Triton or other kernels says nothing: the shapes written beside the kernels are then used.
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
"""A candidate replaces the default only if it takes less than this share of its time: less than that is noise."""


@dataclass(frozen=True)
class Launch:
    """Tile shape and launch options of one kernel."""

    rows: int
    columns: int
    warps: int
    stages: int
    registers: int | None = None
    """Most registers of a thread, where the compiler must be told that it may use them all."""
    hide_zero: bool = True
    """Whether what dropout drops becomes a zero that the compiler does not know to be one.

    Before Blackwell, it would select after rounding to 16 bits, which takes twice the instructions.
    """

    @property
    def options(self) -> dict[str, int | bool]:
        # Said out loud because Triton's default for fused multiply-add changes between releases.
        options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}
        return options if self.registers is None else options | {"maxnreg": self.registers}


def fastest(default: Launch, candidates: Iterable[Launch], seconds: Callable[[Launch], float]) -> tuple[Launch, float]:
    """The launch to use and its time over the default's: the fastest candidate if it is clearly faster, else `default`.

    A candidate for which `seconds` raises (it does not compile, does not fit the card, or is wrong) is no choice.
    """
    limit = seconds(default)
    best, best_seconds = default, limit
    for candidate in candidates:
        if candidate == default:
            continue
        try:
            taken = seconds(candidate)
        except Exception:  # Compilers and drivers fail in many ways, and none of them makes a candidate usable.
            continue
        if taken < min(best_seconds, GAIN * limit):
            best, best_seconds = candidate, taken
    return best, best_seconds / limit


def table_path(card: str, capability: int, triton_version: str) -> Path:
    """Where the launches of one card and release of Triton lie: under $XDG_CACHE_HOME, or ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    slug = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    return Path(cache) / "fedbert-ds" / "launches" / f"{slug}-sm{capability}-triton-{triton_version}.json"


def digest(*sources: str | Path) -> str:
    """Of the files a kernel is written in: a launch that was good for other code may spill or be slow for this."""
    return hashlib.sha256(b"".join(Path(source).read_bytes() for source in sources)).hexdigest()[:16]


def read_table(path: Path, kernels: str) -> dict[str, Launch]:
    """{shape class: launch} of a file written for the kernels with this digest; empty if there is none."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if table["kernels"] != kernels:
            return {}
        return {name: Launch(**launch) for name, launch in table["launches"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def write_table(path: Path, kernels: str, launches: Mapping[str, Launch]) -> None:
    """Add launches to the file, whole or not at all; what it holds of other kernels goes."""
    merged = read_table(path, kernels) | dict(launches)
    write_json(path, {"kernels": kernels, "launches": {name: asdict(merged[name]) for name in sorted(merged)}})


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Make the file, whole or not at all; OSError if it cannot be made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False, encoding="utf-8") as scratch:
        json.dump(value, scratch, indent=1)
    os.replace(scratch.name, path)
