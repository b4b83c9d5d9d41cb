"""Signals and lost launchers save and end a run; a second Ctrl-C is not waited for."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from fedbert_ds.server.stop_signal import StopSignal

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in NUMBERS}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_is_a_request(number: signal.Signals) -> None:
    stop = StopSignal()
    assert not stop.requested
    signal.raise_signal(number)
    assert stop.requested


def test_what_nohup_ignores_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopSignal()
    signal.raise_signal(signal.SIGHUP)
    assert not stop.requested


def test_a_second_ctrl_c_kills_and_a_second_warning_does_not() -> None:
    stop = StopSignal()
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.raise_signal(number)
    assert stop.requested
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_launcher_that_is_gone_is_a_request_and_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    launchers: Any = SimpleNamespace(are_gone=False)
    stop = StopSignal(launchers)
    assert not stop.requested
    launchers.are_gone = True
    assert stop.requested and stop.requested
    assert capsys.readouterr().out == "warning the launcher is gone: the run saves and ends; go on with --resume\n"
    asked = StopSignal(launchers)
    signal.raise_signal(signal.SIGTERM)
    assert asked.requested and capsys.readouterr().out == "", "whoever asked it to end has ended, too"
