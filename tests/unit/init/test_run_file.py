"""The text of a run file: each value stands under what it is, and reads back as it was."""

from __future__ import annotations

from typing import Any

import yaml

from fedbert_ds.config import RunConfig
from fedbert_ds.init.run_file import run_file
from fedbert_ds.run_file import parse_config

TREE: dict[str, Any] = {
    "federation": {"mode": "parallel", "average_every": 50},
    "cut": {"layers": 1},
    "data": {"source": ["my notes", "café: #1"], "sequence_length": 16},
    "optimizer": {"lr": 1e-5},
    "body": {"deepspeed": None},
    "server": {"host": "0.0.0.0", "tls": {"ca": "ca.pem", "certificate": "a.pem", "key": "a.key"}},
}
REASONS = {"federation.mode": "Here: it is fast", "server.tls.ca": "DECIDE: who signs"}


def text() -> str:
    return run_file(TREE, REASONS, ["A run.", "It is long: " + "word " * 60])


def test_it_reads_back_as_it_was() -> None:
    assert yaml.safe_load(text()) == TREE
    assert parse_config(yaml.safe_load(text()), "test") == parse_config(TREE, "test")


def test_every_value_has_a_comment_above_it() -> None:
    lines = text().splitlines()
    for number, line in enumerate(lines):
        if line and not line.lstrip().startswith("#"):
            above = lines[number - 1]
            assert above.lstrip().startswith("# ") and len(above) - len(above.lstrip()) == len(line) - len(
                line.lstrip()
            ), line


def test_what_a_key_is_comes_from_its_documentation() -> None:
    words = " ".join(text().replace("#", " ").split())
    for section, key in (("optimizer", "lr"), ("server", "host"), ("federation", "average_every")):
        kind: Any = RunConfig.model_fields[section].annotation
        assert " ".join(kind.model_fields[key].description.split()) in words
    assert " ".join((RunConfig.model_fields["cut"].description or "").split()) in words
    assert "Here: it is fast. mode: parallel" in words and "DECIDE: who signs. ca: ca.pem" in words


def test_lines_wrap_and_sections_have_the_schema_s_order() -> None:
    assert all(len(line) <= 100 for line in text().splitlines())
    sections = [line.rstrip(":") for line in text().splitlines() if line.endswith(":") and line[0].isalpha()]
    assert sections == ["data", "optimizer", "body", "federation", "server"]
