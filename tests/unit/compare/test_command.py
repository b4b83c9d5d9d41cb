"""`fedbert-ds compare` hands on what was typed; an interrupt is one line and exit code 130."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedbert_ds import cli
from fedbert_ds.compare import experiment


def test_options_reach_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(experiment, "compare", given.append)
    arguments = [
        "compare",
        "run.yaml",
        "run.seed=2",
        "--out",
        "o",
        "--systems",
        "alone",
        "diloco:4",
        "--seeds",
        "0",
        "1",
    ]
    arguments += ["--glue", "g", "--tasks", "RTE", "--patience", "3", "--quick"]
    monkeypatch.setattr("sys.argv", ["fedbert-ds", *arguments])
    cli.main(arguments)
    (options,) = given
    assert options.run_file == Path("run.yaml") and options.out == Path("o") and options.overrides == ("run.seed=2",)
    assert options.systems == ("alone", "diloco:4") and options.seeds == (0, 1) and options.patience == 3
    assert options.glue == Path("g") and options.tasks == ("RTE",) and options.glue_seeds == (0, 1, 2)
    assert options.quick and options.ranks == 1 and options.command == f"fedbert-ds {' '.join(arguments)}"


def test_an_interrupt_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "compare", interrupted)
    with pytest.raises(SystemExit) as raised:
        cli.main(["compare", "run.yaml", "--out", "o"])
    assert raised.value.code == 130
    assert "the same command goes on" in capsys.readouterr().err
