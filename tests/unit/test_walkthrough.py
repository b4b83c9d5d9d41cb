"""The page of a first run, typed: its lines are those that its program types, and they parse."""

from __future__ import annotations

import re
from pathlib import Path

from integration.walkthrough import CLIENTS, RUN_FILE

from fedbert_ds.cli import build_parser
from fedbert_ds.run_file import load_config

PAGE = Path(__file__).parents[2] / "docs" / "walkthrough.md"


def test_every_line_parses() -> None:
    typed = re.findall(r"^\w+\$ fedbert-ds (.*?)(?: &)?$", PAGE.read_text("utf-8"), re.MULTILINE)
    assert {line.split()[0] for line in typed} == {"certs", "doctor", "client", "eval"}
    for line in typed:
        build_parser().parse_args(line.split())
    for options in CLIENTS.values():
        assert any(line.startswith("client ") and options in line for line in typed)


def test_the_run_file_on_the_page_is_the_programs_and_loads(tmp_path: Path) -> None:
    assert RUN_FILE.strip() in PAGE.read_text("utf-8")
    (tmp_path / "notes.yaml").write_text(RUN_FILE)
    assert load_config(tmp_path / "notes.yaml").clients.expected == 3
