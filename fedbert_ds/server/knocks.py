"""Tells every rank at once who waits to join, so that a client's new process need not wait for its
old one.

Ranks hear each other between windows. A window that waits for a client whose process is dead would
wait for `clients.reconnect_timeout`, though its next process is at the coordinator's door.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import torch.distributed as dist

from fedbert_ds.server.network.decoding import DecodedEvent
from fedbert_ds.server.network.events import Knocked
from fedbert_ds.server.network.sessions import TakeEvent

KNOCK_SECONDS = 0.5
"""Between two looks at who waits."""


class Knocks:
    """Names that wait at rank 0, passed on through the store at which the ranks have met."""

    def __init__(self, rank: int, world_size: int, environment: Mapping[str, str] = os.environ) -> None:
        self._is_first = rank == 0
        self._where = (environment["MASTER_ADDR"], int(environment["MASTER_PORT"])) if world_size > 1 else None
        self._key = f"fedbert/knocks/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._names: tuple[str, ...] = ()
        self._events: deque[Knocked] = deque()
        self._looked = 0.0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._pass_on, name="knocks", daemon=True)

    def start(self) -> None:
        """Begin to pass names on; one rank has nobody to tell."""
        if self._where is not None:
            self._thread.start()

    def stop(self) -> None:
        """No more of it."""
        self._is_over.set()

    def among(self, take_event: TakeEvent, waiting: Callable[[], Sequence[str]]) -> TakeEvent:
        """`take_event` with knocks among its events. On rank 0 `waiting` says who waits."""

        def take(timeout: float) -> DecodedEvent | None:
            now = time.monotonic()
            if not self._events and now - self._looked >= KNOCK_SECONDS:
                self._looked = now
                if self._is_first:
                    self._names = tuple(waiting())
                self._events.extend(map(Knocked, self._names))
            return self._events.popleft() if self._events else take_event(timeout)

        return take

    def _pass_on(self) -> None:
        store: dist.TCPStore | None = None
        told: tuple[str, ...] = ()
        while not self._is_over.wait(KNOCK_SECONDS):
            assert self._where is not None
            try:
                store = store or dist.TCPStore(*self._where, is_master=False, wait_for_workers=False)
                if not self._is_first:
                    self._names = tuple(json.loads(store.get(self._key))) if store.check([self._key]) else ()
                elif (names := self._names) != told:
                    store.set(self._key, json.dumps(names))
                    told = names
            except RuntimeError:
                store = None
