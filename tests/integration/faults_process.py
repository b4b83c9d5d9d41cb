"""What a process of a run does to itself on a signal: lose its connections, send a frame twice."""

from __future__ import annotations

import os
import signal
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedbert_ds.wire.conversation import Conversation

DROP = signal.SIGRTMIN + 1
"""To a client: its connections are gone, as when a router forgets them."""
DUPLICATE = signal.SIGRTMIN + 2
"""To any process: the next frame that it sends comes twice."""

_to_repeat = [0]


def obey() -> None:
    """Do so from now on."""
    signal.signal(DROP, lambda *_: _hang_up())
    signal.signal(DUPLICATE, lambda *_: _to_repeat.__setitem__(0, _to_repeat[0] + 1))
    frame = Conversation.frame
    repeated: dict[Conversation, bytes] = {}

    def frame_or_again(self: Conversation, *arguments: Any, **keywords: Any) -> bytes | None:
        if self in repeated:
            return repeated.pop(self)
        made = frame(self, *arguments, **keywords)
        # In shared memory the second of two would find another message's bytes.
        if made is not None and _to_repeat[0] and self.ring is None:
            _to_repeat[0] -= 1
            repeated[self] = made
        return made

    Conversation.frame = frame_or_again  # type: ignore[method-assign]


def _hang_up() -> None:
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if not os.readlink(Path("/proc/self/fd") / name).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as one:
                if one.family in (socket.AF_INET, socket.AF_INET6) and one.type == socket.SOCK_STREAM:
                    one.shutdown(socket.SHUT_RDWR)
