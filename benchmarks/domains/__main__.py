"""Fetch documentation packages of Debian and write their text, one .jsonl file for each domain."""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.domains.packages import DOMAINS, Domain
from fedbert_ds.errors import DataError, one_line_errors

SHORTEST_ARTICLE = 200
"""Characters below which a page is a heading, not an article."""


def build_parser() -> argparse.ArgumentParser:
    """The program's options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.domains", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the .jsonl files")
    parser.add_argument("--domains", nargs="+", choices=sorted(DOMAINS), default=sorted(DOMAINS))
    return parser


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Write OUT/DOMAIN.jsonl for each domain, and say what each holds."""
    options = build_parser().parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.domains:
        with tempfile.TemporaryDirectory() as folder:
            release = unpack(DOMAINS[name].package, Path(folder))
            text, count = lines(DOMAINS[name], Path(folder))
        (options.out / f"{name}.jsonl").write_text(text, "utf-8")
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        print(f"{name:9} {count:6,} articles  {len(text) / 1e6:5.1f} MB  {release}  sha256 {digest}", flush=True)


def lines(domain: Domain, root: Path) -> tuple[str, int]:
    """The articles as JSON lines, and how many they are."""
    articles = [(title, text) for title, text in domain.read(root) if len(text) >= SHORTEST_ARTICLE]
    return "".join(json.dumps({"title": title, "text": text}) + "\n" for title, text in articles), len(articles)


def unpack(package: str, folder: Path) -> str:
    """Fetch a package and unpack it into a folder; returns its file's name, with its version."""
    for command in (["apt-get", "download", package], ["dpkg", "-x", f"{package}_*.deb", "."]):
        command = [str(next(folder.glob(part)).name) if "*" in part else part for part in command]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise DataError(f"{command[0]} is not on this machine; run this on Debian or Ubuntu") from error
        if done.returncode:
            last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
            raise DataError(f"{' '.join(command)} failed: {last}; try `apt-get update` first")
    return next(folder.glob("*.deb")).name


if __name__ == "__main__":
    main()
