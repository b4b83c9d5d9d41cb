"""Signals that save and end a run; a second Ctrl-C is not waited for."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from fedbert_ds.server.stop_signal import StopSignal

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in NUMBERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_is_a_request(number: signal.Signals) -> None:
    stop = StopSignal()
    assert not stop.requested
    signal.raise_signal(number)
    assert stop.requested


def test_a_second_ctrl_c_kills_and_a_second_warning_does_not() -> None:
    stop = StopSignal()
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.raise_signal(number)
    assert stop.requested
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
