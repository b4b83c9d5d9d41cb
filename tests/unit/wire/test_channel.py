"""How long a connection may be silent before it counts as lost: in line with how long a client may
be.
"""

import socket

import grpc
import pytest

from fedbert_ds.config import ClientsSection
from fedbert_ds.server.queue.deadlines import FLOOR_SECONDS
from fedbert_ds.wire.channel import CLIENT_OPTIONS, OPTIONS, await_ready, connect, is_loopback


def test_a_dark_link_is_dialled_again_before_a_window_goes_on_without_its_client() -> None:
    assert dict(OPTIONS)["grpc.keepalive_timeout_ms"] < 1000 * FLOOR_SECONDS


def test_a_dead_proxy_is_noticed_before_its_client_is_dropped() -> None:
    options = dict(CLIENT_OPTIONS)
    seconds = (options["grpc.keepalive_time_ms"] + options["grpc.http2.ping_timeout_ms"]) / 1000
    assert seconds < ClientsSection.model_fields["silence_timeout"].default


def test_a_slow_link_s_answers_may_wait_behind_megabytes() -> None:
    """2 MB at 0.3 Mbit/s, for pings and settings alike."""
    for name in ("grpc.http2.ping_timeout_ms", "grpc.http2.settings_timeout"):
        assert dict(OPTIONS)[name] > 1000 * 2e6 * 8 / 0.3e6


def test_nobody_is_awaited_in_vain() -> None:
    answers = iter([False, False, True])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and not listening
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with connect(address, None) as channel, pytest.raises(grpc.FutureTimeoutError):
            await_ready(channel, address, None, 3600.0, lambda: next(answers))
    assert next(answers, None) is None


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.8.8.8", "localhost", "::1", "[::1]:29600", "127.0.0.1:1", "localhost:1", "[::1]"]
)
def test_what_stays_on_this_machine(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "10.0.0.1", "gpu01", "gpu01:29600", "[::]:1", "localhost.example:1", ""]
)
def test_what_may_leave_it(host: str) -> None:
    assert not is_loopback(host)
