"""Findings: one line each, whatever is in it, and the remedy of an error."""

from __future__ import annotations

from fedbert_ds.doctor.finding import fault, of_error, ok, tried, warning
from fedbert_ds.errors import ConfigError


def test_each_is_one_line_with_its_level_and_remedy() -> None:
    assert ok("disk", "5 GB free").line == "ok    disk: 5 GB free"
    assert warning("GPU", "none", "set fp32").line == "warn  GPU: none; set fp32"
    line = fault("text", "a\nfile\x1b[2J", "mend it").line
    assert line.startswith("fail  text: a file") and line.endswith("; mend it") and line.isprintable()


def test_only_a_fault_is_in_the_way() -> None:
    assert [one.is_in_the_way for one in (ok("a", "b"), warning("a", "b", "c"), fault("a", "b", "c"))] == [
        False,
        False,
        True,
    ]


def test_an_error_s_remedy_stands_behind_its_first_semicolon() -> None:
    finding = of_error("port", ConfigError("port 5 is in use; end that process; or set another"))
    assert finding == fault("port", "port 5 is in use", "end that process; or set another")


def test_a_check_of_the_run_s_own_becomes_a_finding() -> None:
    def refuses() -> None:
        raise ConfigError("no; yes")

    assert tried("a", lambda: None, "fits") == ok("a", "fits")
    assert tried("a", refuses, "fits") == fault("a", "no", "yes")
