"""`fedbert-ds doctor`: a line each, the exit code, and options of two sides or none."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedbert_ds.cli import main
from fedbert_ds.doctor import run
from fedbert_ds.doctor.command import told
from fedbert_ds.doctor.finding import fault, ok, warning


def doctor(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as exit_:
        main(["doctor", *arguments])
    return exit_.value.code


def test_findings_are_printed_and_faults_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert told([ok("a", "b"), warning("c", "d", "e"), fault("f", "g", "h")]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "ok    a: b", "warn  c: d; e", "fail  f: g; h", "1 of these would stop the run"
    ]  # fmt: skip
    assert told([ok("a", "b"), warning("c", "d", "e")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "nothing here would stop the run"


@pytest.mark.parametrize(("level", "code"), [("ok", 0), ("fail", 1)])
def test_the_exit_code_is_1_for_a_fault_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: str, code: int
) -> None:
    given: list[object] = []

    def examine(config: object, ranks: int | None) -> list[object]:
        given.append((config, ranks))
        return [ok("a", "b") if level == "ok" else fault("a", "b", "c")]

    monkeypatch.setattr(run, "examine_run", examine)
    (tmp_path / "run.yaml").write_text("body: {deepspeed: null}")
    assert doctor(str(tmp_path / "run.yaml"), "run.seed=7", "--ranks", "3") == code
    ((config, ranks),) = given  # type: ignore[misc]
    assert config.run.seed == 7 and ranks == 3


def test_a_run_file_that_is_wrong_is_a_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("body: {zero_stgae: 1}")
    assert doctor(str(tmp_path / "run.yaml")) == 1
    assert "fail  run file: " in (out := capsys.readouterr().out) and "did you mean body.zero_stage?" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give a run file at the server, or --server"),
        (["run.yaml", "--server", "x:1"], "looks at one side"),
        (["--server", "x:1", "--data", "y", "--ca", "ca.pem"], "give all of --ca"),
        (["run.yaml", "--ranks", "0"], "--ranks 0: at least 1"),
    ],
)
def test_options_that_do_not_fit_are_one_line(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor(*arguments) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
