"""Known vulnerabilities of the installed packages, by pip-audit; a look that saw nothing is told.

    python .ci/audit.py REPORT.json     after pip-audit --format json --output REPORT.json

Exit code 0: every package that the advisory service knows is without one. 1: some have one. 75
(EX_TEMPFAIL of sysexits.h): nothing was audited, as the service was not reached or knows none.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CLEAN, VULNERABLE, NOT_AUDITED = 0, 1, 75


def verdict(dependencies: Sequence[Mapping[str, Any]]) -> tuple[int, list[str]]:
    """The exit code for pip-audit's `dependencies`, and what to say."""
    audited = [package for package in dependencies if "skip_reason" not in package]
    unknown = [package["name"] for package in dependencies if "skip_reason" in package]
    if not audited:
        return NOT_AUDITED, [f"audit   not done: the advisory service knows none of {len(unknown)} packages"]
    found = [(package, flaw) for package in audited for flaw in package["vulns"]]
    lines = [
        f"audit   {package['name']} {package['version']}: {flaw['id']}, mended in "
        f"{', '.join(flaw['fix_versions']) or 'no version yet'}"
        for package, flaw in found
    ]
    if unknown:
        lines.append(f"audit   unknown to the advisory service: {', '.join(sorted(unknown))}")
    lines.append(f"audit   {len(audited)} packages, {len(found)} known vulnerabilities")
    return VULNERABLE if found else CLEAN, lines


def main(report: Path) -> int:
    """Read pip-audit's report and tell it."""
    if not report.is_file():
        print("audit   not done: the advisory service was not reached")
        return NOT_AUDITED
    code, lines = verdict(json.loads(report.read_text(encoding="utf-8"))["dependencies"])
    print("\n".join(lines))
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
