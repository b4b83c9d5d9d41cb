"""Long steps are told: live on a terminal, a line a minute in a log, short ones not at all."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from fedbert_ds.data import long_steps
from fedbert_ds.data.byte_bpe import train_byte_bpe
from fedbert_ds.data.corpus import Article
from fedbert_ds.data.long_steps import telling, working
from fedbert_ds.data.tokenizer import train_wordpiece
from fedbert_ds.seeding import generator


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def clock_of(step: float) -> Iterator[float]:
    now = 0.0
    while True:
        yield now
        now += step


def told(stream: io.StringIO, step: float, items: int = 10, total: int | None = None) -> str:
    """What is printed of items of 10 million characters, with so many seconds between looks."""
    clock = clock_of(step)
    given = ["x"] * items
    assert list(telling(given, "tokenizing", lambda _: 10**7, total, stream=stream, clock=lambda: next(clock))) == given
    return stream.getvalue()


def test_a_log_has_a_line_a_minute() -> None:
    lines = told(io.StringIO(), 25.0).splitlines()
    assert lines[0] == "tokenizing: 30 million characters" and len(lines) == 3


def test_a_short_step_is_not_told() -> None:
    assert told(io.StringIO(), 1.0) == ""
    assert told(Terminal(), 0.001) == ""


def test_of_a_known_total_the_share_and_the_time_are_told() -> None:
    first = told(io.StringIO(), 600.0, total=10**8).splitlines()[0]
    assert first == "tokenizing: 10 million characters of 100 million, 10 %, 3 h 00 min left"


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_a_terminal_has_one_line_which_goes_in_the_end(monkeypatch: pytest.MonkeyPatch, term: str) -> None:
    monkeypatch.setenv("TERM", term)
    printed = told(Terminal(), 0.4)
    assert "\n" not in printed
    assert (printed == "") == (term == "dumb")
    if printed:
        *lines, blank, end = printed.split("\r")
        assert lines[1] == "tokenizing: 20 million characters" and not end
        assert not blank.strip() and len(blank) == max(map(len, lines))


class Log(io.StringIO):
    """Says when something was written."""

    def __init__(self) -> None:
        super().__init__()
        self.is_written = threading.Event()

    def write(self, text: str) -> int:
        written = super().write(text)
        self.is_written.set()
        return written


@pytest.mark.parametrize(("seconds", "told"), [(2.0, "2 s"), (59.6, "60 s"), (60.0, "1 min"), (7500.0, "2 h 05 min")])
def test_a_step_of_unknown_length_tells_its_time(seconds: float, told: str) -> None:
    log, clock = Log(), clock_of(seconds)
    with working("training", stream=log, pause=0.01, clock=lambda: next(clock)):
        assert log.is_written.wait(10)
    assert log.getvalue().splitlines()[0] == f"training: {told} so far"


def test_a_short_step_of_unknown_length_is_not_told() -> None:
    log = Log()
    with working("training", stream=log):
        pass
    assert log.getvalue() == ""


@pytest.mark.parametrize("kind", ["wordpiece", "byte_bpe"])
def test_training_a_tokenizer_is_told(kind: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The trainer holds no lock meanwhile: other threads run."""
    monkeypatch.setattr(long_steps, "LOG_SECONDS", 0.001)
    random = generator("words")
    articles = [Article("", " ".join(map(str, random.integers(10**7, size=20_000)))) for _ in range(5)]
    if kind == "wordpiece":
        train_wordpiece(articles, 8000)
    else:
        train_byte_bpe(articles, 8000)
    assert capsys.readouterr().out.splitlines()[-1].startswith("text    training the tokenizer: ")
