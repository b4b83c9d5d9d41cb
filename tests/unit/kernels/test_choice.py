"""A way runs on a card by its measurements alone, which a file keeps and all processes share."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from unit.kernels.bounds import needs_triton

from fedbert_kernels import choice
from fedbert_kernels.choice import agreed, choices_path, choose, kept, measure_again

pytestmark = needs_triton

CARD = torch.device("cuda", 0)


@dataclass(frozen=True)
class Example:
    """A case with ways `ours`, `other` and `third`, of which some may be missing or fail."""

    name: str = "a case"
    times: dict[str, Any] = field(default_factory=lambda: {"ours": 1.0, "other": 0.5})
    """Milliseconds of a way, or what it raises."""
    packages: dict[str, str] = field(default_factory=dict)
    digest: str = "of this code"
    default: str = "ours"
    off_gpu: str = "ours"
    measured: list[str] = field(default_factory=list)

    def releases(self) -> dict[str, str]:
        return {way: self.packages.get(way, "") for way in self.times}

    def missing(self) -> dict[str, str]:
        return {} if "third" in self.times else {"third": "not installed"}

    def step(self, way: str, device: torch.device) -> Callable[[], object]:
        self.measured.append(way)
        if isinstance(self.times[way], Exception):
            raise self.times[way]
        return lambda: self.times[way]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The file of a card on which nothing was measured yet."""
    import triton.testing

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A Card")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(choice, "capability", lambda _: 90)
    monkeypatch.setattr(triton.testing, "do_bench", lambda call, return_mode: call())
    monkeypatch.setattr(torch.cuda, "device", lambda _: torch.device("cpu"))
    # Without a GPU there is only the CPU's generator to leave alone.
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices, fork=torch.random.fork_rng: fork(devices=[]))
    return choices_path(0)


@pytest.mark.parametrize(
    ("milliseconds", "chosen"),
    [
        ({"ours": 1.0, "other": 0.96}, "other"),
        ({"ours": 1.0, "other": 0.98}, "ours"),
        ({"ours": 1.0, "other": 1.0}, "ours"),
        ({"ours": 1.0, "other": 0.9, "third": 0.5}, "third"),
        ({"ours": 1.0, "other": 0.5, "third": 0.5}, "other"),
        ({"other": 5.0, "third": 4.0}, "third"),
        ({"ours": 1.0}, "ours"),
        ({}, "ours"),
    ],
)
def test_the_fastest_runs_if_it_is_clearly_faster_than_the_default(milliseconds, chosen: str) -> None:
    assert choose("ours", milliseconds) == chosen


def test_a_case_is_measured_once_for_a_card(card) -> None:
    first, second = Example(), Example("another", {"ours": 1.0, "other": 2.0})
    assert kept([first, first, second], CARD) == {"a case": "other", "another": "ours"}
    assert first.measured == second.measured == ["ours", "other"]
    again, new = Example(times={"ours": 1.0, "other": 2.0}), Example("new")
    assert kept([again], torch.device("cuda")) == {"a case": "other"}
    assert kept([again, new], CARD) == {"a case": "other", "new": "other"}
    assert again.measured == [] and new.measured == ["ours", "other"], "only what nobody had measured"


def test_the_file_says_what_was_measured_and_why_a_way_is_left_out(card, caplog) -> None:
    times = {"ours": 1.0, "other": RuntimeError("no C compiler\nand much more")}
    with caplog.at_level(logging.WARNING):
        assert kept([Example(times=times)], CARD) == {"a case": "ours"}
    entry = json.loads(card.read_text())["outcomes"]["a case"]
    assert entry["left_out"] == {"third": "not installed", "other": "no C compiler"}
    assert entry["milliseconds"] == {"ours": 1.0} and entry["chosen"] == "ours"
    for way in ("other is left out: no C compiler", "third is left out: not installed"):
        assert caplog.text.count(way) == 1
    caplog.clear()
    again = Example(times=times)
    assert kept([again], CARD) == {"a case": "ours"}
    assert again.measured == [] and caplog.text == "", "told once"


def test_what_found_no_memory_is_tried_again_next_time(card) -> None:
    full = Example(times={"ours": 1.0, "other": torch.cuda.OutOfMemoryError("CUDA out of memory")})
    assert kept([full], CARD) == {"a case": "ours"}
    roomy = Example()
    assert kept([roomy], CARD) == {"a case": "other"}
    assert roomy.measured == ["ours", "other"]


@pytest.mark.parametrize(
    "changed",
    [
        {"digest": "of other code"},
        {"packages": {"other": "2.8"}},
        {"times": {"ours": 1.0, "other": 2.0, "third": 3.0}},
        {"times": {"ours": 1.0}},
    ],
    ids=["code", "release", "installed", "removed"],
)
def test_other_code_or_packages_are_measured_anew(card, changed) -> None:
    kept([Example()], CARD)
    after = Example(**changed)
    kept([after], CARD)
    assert after.measured == list(after.times)


def test_who_waited_for_another_process_reads_what_that_one_wrote(card: Path, monkeypatch) -> None:
    kept([Example()], CARD)
    of_the_other = card.read_text()
    card.unlink()
    late = Example(times={"ours": 1.0, "other": 2.0})

    class Lock:
        """Another process has it, and writes the file before it lets go."""

        def __init__(self, path: Path, timeout: float) -> None:
            assert path.parent == card.parent

        def __enter__(self) -> None:
            card.write_text(of_the_other)

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(choice, "FileLock", Lock)
    assert kept([late], CARD) == {"a case": "other"}
    assert late.measured == []


def test_a_process_that_holds_the_lock_for_too_long_is_not_waited_for(card: Path, monkeypatch) -> None:
    monkeypatch.setattr(choice, "LONGEST_WAIT", 0.1)
    card.parent.mkdir(parents=True)
    with FileLock(card.with_suffix(".lock")):
        assert kept([Example()], CARD) == {"a case": "other"}


PROGRAM = """
import sys, time, torch
sys.path[:0] = sys.argv[1:2]
from pathlib import Path
from unit.kernels.test_choice import CARD, Example
from fedbert_kernels import choice
torch.cuda.get_device_name = lambda _: "A Card"
choice.capability = lambda _: 90
folder, name = Path(sys.argv[2]), sys.argv[3]
def measure(case, index):
    (folder / f"{case.name} by {name}").touch()
    time.sleep(0.5)
    chosen = choice.choose("ours", case.times)
    return choice.Outcome(chosen, {}, {}, case.releases(), case.digest), True
choice.measure = measure
"""
"""Before it measures, a process leaves a mark."""


def answers_of(program: str, folder: Path, caches: tuple[str, str]) -> list[str]:
    """What two processes print; they are called 0 and 1, and have these cache folders."""
    processes = []
    for name, cache in enumerate(caches):
        environment = os.environ | {"XDG_CACHE_HOME": str(folder / cache), "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-c", PROGRAM + program, str(Path(__file__).parents[2]), str(folder), str(name)]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    answers = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    return answers


def test_processes_that_start_together_measure_once(tmp_path: Path) -> None:
    # One would keep our kernel and the other would not: they must agree.
    program = 'print(choice.kept([Example(times={"ours": 1.0, "other": 2.0 * int(name)})], CARD))'
    assert len(set(answers_of(program, tmp_path, ("cache", "cache")))) == 1
    assert len(list(tmp_path.glob("* by *"))) == 1


def test_ranks_of_two_machines_run_the_same(tmp_path: Path) -> None:
    program = """
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=int(name), world_size=2)
disputed = Example("disputed", {"ours": 1.0, "other": 2.0 * int(name)})
print(choice.kept([Example("agreed"), disputed], CARD))
torch.distributed.destroy_process_group()
"""
    assert answers_of(program, tmp_path, ("one", "two")) == ["{'agreed': 'other', 'disputed': 'ours'}"] * 2
    assert len(list(tmp_path.glob("* by *"))) == 4


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"outcomes": 4}', '{"outcomes": {"a case": 3}}', '{"outcomes": {"a case": {}}}']
)
def test_a_file_that_says_nothing_is_measured_over(card: Path, content: str) -> None:
    card.parent.mkdir(parents=True)
    card.write_text(content)
    assert kept([Example()], CARD) == {"a case": "other"}
    assert set(json.loads(card.read_text())["outcomes"]) == {"a case"}


def test_a_new_measurement_replaces_an_old_one_and_no_other(card: Path) -> None:
    kept([Example(), Example("another")], CARD)
    outcomes = measure_again([Example(times={"ours": 1.0, "other": 2.0})], CARD)
    assert outcomes["a case"].milliseconds == {"ours": 1.0, "other": 2.0}
    known = Example(times={"ours": 0.0, "other": 0.0}), Example("another", {"ours": 0.0, "other": 0.0})
    assert kept(known, CARD) == {"a case": "ours", "another": "other"}
    assert [path.name for path in card.parent.iterdir() if path.suffix == ".part"] == []


def test_where_no_file_can_be_written_a_run_starts_all_the_same(card: Path, caplog) -> None:
    card.parent.parent.mkdir(parents=True)
    card.parent.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        assert kept([Example()], CARD) == {"a case": "other"}
    assert "cannot be written" in caplog.text


def test_off_a_gpu_nothing_is_measured() -> None:
    case = Example(off_gpu="third")
    assert kept([case], torch.device("cpu")) == {"a case": "third"}
    assert case.measured == []


def test_a_measurement_leaves_torch_s_random_numbers_alone(card) -> None:
    class Draws(Example):
        def step(self, way: str, device: torch.device) -> Callable[[], object]:
            torch.manual_seed(9)
            return super().step(way, device)

    before = torch.get_rng_state()
    choice.measure(Draws(), 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_ranks_that_measured_differently_take_the_default() -> None:
    first, second = {"a": "ours", "b": "other"}, {"a": "ours", "b": "third"}
    assert agreed({"a": "other", "b": "ours"}, [first, second]) == {"a": "ours", "b": "ours"}
    assert agreed({"b": "ours"}, [first]) == {"b": "other"}
