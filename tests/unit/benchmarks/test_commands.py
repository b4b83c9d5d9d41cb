"""Every command on the pages of reading parses with the real parsers, and its overrides load; every
record has one."""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from integration.chaos import build_parser as chaos_parser
from integration.faults import build_parser as faults_parser
from integration.lies import build_parser as lies_parser
from simulation.schedules import build_parser as schedules_parser

from benchmarks.card.__main__ import build_parser as card_parser
from benchmarks.codecs.__main__ import build_parser as codecs_parser
from benchmarks.codecs.settings import RUN_FILE as CODECS_RUN_FILE
from benchmarks.collectives.__main__ import build_parser as collectives_parser
from benchmarks.domains.__main__ import build_parser as domains_parser
from benchmarks.evaluation.__main__ import build_parser as evaluation_parser
from benchmarks.fine_tuning.__main__ import build_parser as fine_tuning_parser
from benchmarks.fp8.__main__ import build_parser as fp8_parser
from benchmarks.glue.__main__ import build_parser as glue_parser
from benchmarks.kernels.__main__ import build_parser as kernels_parser
from benchmarks.large_text.__main__ import build_parser as large_text_parser
from benchmarks.liars.__main__ import build_parser as liars_parser
from benchmarks.liars.runs import RUN_FILE as LIARS_RUN_FILE
from benchmarks.memory.__main__ import build_parser as memory_parser
from benchmarks.memory.runs import RUN_FILE as MEMORY_RUN_FILE
from benchmarks.modes.__main__ import build_parser as modes_parser
from benchmarks.modes.systems import RUN_FILE as MODES_RUN_FILE
from benchmarks.naive.__main__ import build_parser as naive_parser
from benchmarks.optimizers.__main__ import build_parser as optimizers_parser
from fedbert_ds.bench.pipeline.settings import RUN_FILE as PIPELINE_RUN_FILE
from fedbert_ds.cli import build_parser as installed_parser
from fedbert_ds.run_file import load_config

ROOT = Path(__file__).parents[3]
PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md", ROOT / "kernels" / "README.md", *ROOT.glob("docs/*.md"))
RECORDS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
PROGRAMS: dict[str, tuple[Callable[[], argparse.ArgumentParser], Path | None]] = {
    "fedbert-ds": (installed_parser, None),
    "python -m benchmarks.modes": (modes_parser, MODES_RUN_FILE),
    "python -m benchmarks.card": (card_parser, None),
    "python -m benchmarks.codecs": (codecs_parser, CODECS_RUN_FILE),
    "python -m benchmarks.collectives": (collectives_parser, None),
    "python -m benchmarks.domains": (domains_parser, None),
    "python -m benchmarks.evaluation": (evaluation_parser, None),
    "python -m benchmarks.fine_tuning": (fine_tuning_parser, None),
    "python -m benchmarks.fp8": (fp8_parser, CODECS_RUN_FILE),
    "python -m benchmarks.glue": (glue_parser, None),
    "python -m benchmarks.kernels": (kernels_parser, None),
    "python -m benchmarks.large_text": (large_text_parser, MEMORY_RUN_FILE),
    "python -m benchmarks.liars": (liars_parser, LIARS_RUN_FILE),
    "python -m benchmarks.memory": (memory_parser, MEMORY_RUN_FILE),
    "python -m benchmarks.optimizers": (optimizers_parser, MODES_RUN_FILE),
    "python -m benchmarks.naive": (naive_parser, PIPELINE_RUN_FILE),
    "python tests/integration/chaos.py": (chaos_parser, None),
    "python tests/integration/faults.py": (faults_parser, None),
    "python tests/integration/lies.py": (lies_parser, None),
    "python tests/simulation/schedules.py": (schedules_parser, None),
}
"""How each program parses its options, and the run file that its overrides change."""


@dataclass(frozen=True)
class Command:
    """One command on a page."""

    page: str
    program: str
    arguments: tuple[str, ...]

    def parse(self) -> argparse.Namespace:
        """SystemExit(2), with the parser's words on standard error, for options that do not
        exist."""
        return PROGRAMS[self.program][0]().parse_args(self.arguments)

    def __str__(self) -> str:
        return shlex.join([self.page, self.program, *self.arguments])


def commands(pages: Sequence[Path]) -> Iterator[Command]:
    """Lines of code blocks and spans of code that begin with a program's name."""
    for page in pages:
        text = page.read_text(encoding="utf-8")
        blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        spans = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
        for line in (*(line for block in blocks for line in block.splitlines()), *(" ".join(s.split()) for s in spans)):
            for program in PROGRAMS:
                if line == program or line.startswith(f"{program} "):
                    yield Command(page.name, program, tuple(shlex.split(line[len(program) :], comments=True)))


COMMANDS = list(commands(PAGES))
COMPLETE = [command for command in COMMANDS if any(argument.startswith("--") for argument in command.arguments)]
MENTIONS = [command for command in COMMANDS if command not in COMPLETE]


def test_pages_have_commands() -> None:
    assert len(COMPLETE) >= 15 and {command.program for command in COMPLETE} == set(PROGRAMS)


@pytest.mark.parametrize("command", COMPLETE, ids=str)
def test_options_exist(command: Command) -> None:
    options = command.parse()
    overrides: list[Any] = getattr(options, "overrides", [])
    run_file = PROGRAMS[command.program][1] or getattr(options, "config", None) or getattr(options, "run_file", None)
    if getattr(options, "bench", None) == "pipeline":
        run_file = PIPELINE_RUN_FILE
    if run_file is not None and (ROOT / run_file).is_file():
        load_config(ROOT / run_file, overrides)
    else:
        assert not overrides, "which run file they change is not known here"


@pytest.mark.parametrize("command", MENTIONS, ids=str)
def test_what_is_mentioned_exists(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in itertools.product(*(argument.split("|") for argument in command.arguments)):
        with pytest.raises(SystemExit) as exit_:
            Command(command.page, command.program, (*arguments, "--help")).parse()
        assert exit_.value.code == 0, capsys.readouterr().err


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.name)
def test_every_record_has_a_command(record: Path) -> None:
    out = record.relative_to(ROOT)
    # `fedbert-ds glue` and `compare` write a folder, of which the record was copied.
    command = json.loads(record.read_text(encoding="utf-8"))["command"]
    if command.startswith(("fedbert-ds glue ", "fedbert-ds compare ")):
        assert command in (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
        return
    assert any(getattr(command.parse(), "out", None) == out for command in COMPLETE if "--out" in command.arguments)
