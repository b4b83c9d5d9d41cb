"""`fedbert-ds init`: a run file that loads, what to do next, and files that are never replaced."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedbert_ds.cli import build_parser, main
from fedbert_ds.run_file import load_config


def init(*arguments: str) -> None:
    main(["init", "--client-gflops", "50", "--rtt", "5", *arguments])


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run file for owners elsewhere, and what was printed."""
    out = tmp_path_factory.mktemp("init") / "hospitals.yaml"
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        init("--size", "mini", "--clients", "3", "--gpus", "2", "--hours", "2", "--host", "gpu.example",
             "--out", str(out))  # fmt: skip
    return out, "\n".join(lines)


def test_the_file_loads_and_says_what_is_left_to_decide(remote: tuple[Path, str]) -> None:
    config = load_config(remote[0])
    assert (config.model.num_hidden_layers, config.model.hidden_size) == (4, 256)
    assert config.clients.expected == 3 and config.body.precision == "bf16" and config.body.deepspeed is None
    assert str(config.run.directory) == "runs/hospitals"
    text = remote[0].read_text(encoding="utf-8")
    assert text.count("# DECIDE: ") == 2 + text.count("DECIDE: a vocabulary") == 3
    assert "Yours to decide: text" in text


def test_what_is_to_be_run_next_can_be_run(remote: tuple[Path, str]) -> None:
    out, printed = remote
    assert printed.startswith("plan    the planner tries values"), "it takes its time"
    commands = re.findall(r"fedbert-ds ((?:certs|client|doctor) .*)", printed)
    assert len(commands) == 6
    for command in commands:
        build_parser().parse_args(command.partition("#")[0].split())
    assert f"deepspeed --num_gpus 2 launchers/pretrain.py --config {out}" in printed
    assert "fedbert-ds client --server gpu.example:29600" in printed


def test_a_file_that_is_there_stays(remote: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    before = remote[0].read_bytes()
    with pytest.raises(SystemExit) as exit_:
        init("--out", str(remote[0]))
    assert exit_.value.code == 2 and "is there already" in capsys.readouterr().err
    assert remote[0].read_bytes() == before


def test_a_folder_that_is_missing_and_a_size_that_is_none_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, says in (
        (["--out", str(tmp_path / "nowhere" / "run.yaml")], "no such folder"),
        (["--size", "huge", "--out", str(tmp_path / "run.yaml")], "--size huge: choose tiny"),
        (["--gpus", "-1", "--out", str(tmp_path / "run.yaml")], "--gpus -1"),
    ):
        with pytest.raises(SystemExit) as exit_:
            init(*arguments)
        error = capsys.readouterr().err
        assert exit_.value.code == 2 and says in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_try_alone_is_planned_for_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "try.yaml"
    init(
        "--size", "tiny", "--clients", "2", "--gpus", "0", "--hours", "0.1", "--data", "python-docs", "--out", str(out)
    )
    config = load_config(out)
    assert config.clients.local == 2 and config.data.source == ("python-docs",) and config.run.windows > 1
    assert "fedbert-ds client" not in capsys.readouterr().out and "DECIDE" not in out.read_text(encoding="utf-8")
