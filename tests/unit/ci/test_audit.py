"""The audit of dependencies: found, clean, and not done, which must not look clean."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parents[3] / ".ci" / "audit.py"

SOUND = {"name": "sound", "version": "1.0", "vulns": []}
FLAWED = {"name": "flawed", "version": "2.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2.1", "3.0"]}]}
HOPELESS = {"name": "hopeless", "version": "3.0", "vulns": [{"id": "PYSEC-2", "fix_versions": []}]}
UNKNOWN = {"name": "unknown", "skip_reason": "Dependency not found"}


@pytest.mark.parametrize(
    ("packages", "code", "told"),
    [
        ([SOUND], 0, ["1 packages, 0 known vulnerabilities"]),
        ([SOUND, UNKNOWN], 0, ["unknown to the advisory service: unknown", "1 packages, 0 known"]),
        (
            [SOUND, FLAWED, HOPELESS],
            1,
            ["flawed 2.0: PYSEC-1, mended in 2.1, 3.0", "hopeless 3.0: PYSEC-2, mended in no version yet", "2 known"],
        ),
        ([UNKNOWN, UNKNOWN], 75, ["not done: the advisory service knows none of 2 packages"]),
        ([], 75, ["not done"]),
        (None, 75, ["not done: the advisory service was not reached"]),
    ],
)
def test_what_the_audit_says(tmp_path: Path, packages: list[Any] | None, code: int, told: list[str]) -> None:
    report = tmp_path / "report.json"
    if packages is not None:
        report.write_text(json.dumps({"dependencies": packages, "fixes": []}))
    ended = subprocess.run([sys.executable, str(PROGRAM), str(report)], capture_output=True, text=True, check=False)
    assert ended.returncode == code and not ended.stderr
    assert all(sentence in ended.stdout for sentence in told), ended.stdout
