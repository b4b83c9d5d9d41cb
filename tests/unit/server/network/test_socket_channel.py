"""Items over a socket pair: whole and in order, or none when the other side is gone."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from fedbert_ds.server.network.socket_channel import SOCKET_BYTES, SocketChannel


@pytest.fixture
def pair() -> Iterator[tuple[SocketChannel, socket.socket]]:
    """A channel, and the socket at its other end."""
    ours, theirs = socket.socketpair()
    theirs.settimeout(20.0)
    yield SocketChannel(ours), theirs
    ours.close()
    theirs.close()


def test_items_arrive_whole_and_in_order(pair: tuple[SocketChannel, socket.socket]) -> None:
    here, there = pair[0], SocketChannel(pair[1])
    items: list[tuple[list[object], bytes]] = [
        (["admit", {"ada": "é"}], b""),
        ([], b"x"),
        (["received", "bo", 1.5, None], bytes(3 * SOCKET_BYTES)),  # more than the sockets hold
        (["last"], b"\x00\xff"),
    ]
    sender = threading.Thread(target=lambda: [here.send(*item) for item in items])
    sender.start()
    assert [there.receive() for _ in items] == items
    sender.join(timeout=20.0)
    here.close()
    assert there.receive() is None


def test_an_item_that_breaks_off_is_none() -> None:
    whole = SocketChannel.SIZES.pack(2, 100) + b"[]" + bytes(50)
    for part in (whole[:3], whole[:-51], whole):
        ours, theirs = socket.socketpair()
        ours.sendall(part)
        ours.close()
        assert SocketChannel(theirs).receive() is None
        theirs.close()


def test_a_killed_process_that_left_items_unread_is_none(pair: tuple[SocketChannel, socket.socket]) -> None:
    """The system reports a reset then."""
    here, there = pair
    here.send(["connected", "ada"])
    there.close()
    assert here.receive() is None


def test_a_side_that_is_silent_for_the_socket_s_timeout_is_none(pair: tuple[SocketChannel, socket.socket]) -> None:
    _, there = pair
    there.settimeout(0.01)
    assert SocketChannel(there).receive() is None
