"""Ranks hear each other's hearts: one that is frozen or cut off ends the run within a minute."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.distributed as dist

BEAT_SECONDS = 5.0
MOST_MISSED = 10
"""Beats in a row; with the next one a rank is lost, 55 s to 60 s after its last."""
RANK_LOST = 75
"""Exit code of the ranks that are left (EX_TEMPFAIL of sysexits.h): start all of them again."""
FAREWELL_SECONDS = 10.0
DONE = "done"
"""In place of a beat: the rank has ended as it should."""


class Silences:
    """Counts how many beats of its own a rank has made since it heard a new one of each other.

    Not seconds: where all ranks are suspended together, nobody was silent.
    """

    def __init__(self, others: Sequence[int]) -> None:
        self._last: dict[int, str | None] = dict.fromkeys(others)
        self._missed = dict.fromkeys(others, 0)

    def hear(self, beats: Mapping[int, str]) -> None:
        """What was heard of others with one beat of the own heart."""
        for rank, last in self._last.items():
            beat = beats.get(rank, last)
            self._missed[rank] = 0 if beat == DONE or beat != last else self._missed[rank] + 1
            self._last[rank] = beat

    def lost(self, most_missed: int) -> list[int]:
        """Ranks that were silent for longer."""
        return [rank for rank, missed in self._missed.items() if missed > most_missed]


class Heartbeat:
    """Beats through the store at which the ranks have met, and listens, in two threads.

    A rank that is lost can take no part in a save. So the run ends with RANK_LOST, and goes on from
    its last checkpoint when it is started again. One rank has nobody to listen to.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        environment: Mapping[str, str] = os.environ,
        seconds: float = BEAT_SECONDS,
        most_missed: int = MOST_MISSED,
        end: Callable[[int], Any] = os._exit,
    ) -> None:
        self._rank, self._world_size = rank, world_size
        self._where = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
        self._start = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
        """torchrun keeps its store over a restart."""
        self._seconds, self._most_missed, self._end = seconds, most_missed, end
        self._heard: dict[int, str] = {}
        """The last beat of each other rank."""
        self._is_over = threading.Event()
        # Apart, for the store may be lost with rank 0 and then never answers.
        self._beating = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._listening = threading.Thread(target=self._listen, name="heartbeats of others", daemon=True)

    def start(self) -> None:
        """Begin to beat and to listen."""
        if self._world_size > 1:
            self._beating.start()
            self._listening.start()

    def stop(self) -> None:
        """Say farewell: this rank's end is none of the run's."""
        self._is_over.set()
        if self._world_size > 1:
            self._listening.join()
            self._beating.join(timeout=FAREWELL_SECONDS)

    def _beat(self) -> None:
        store: dist.TCPStore | None = None
        beats = 0
        while True:
            is_over = self._is_over.wait(self._seconds)
            beats += 1
            try:
                # A connection of its own: the one at which ranks have met may wait for hours.
                store = store or dist.TCPStore(*self._where, is_master=False, wait_for_workers=False)
                store.set(self._key(self._rank), DONE if is_over else str(beats))
                for other in range(self._world_size):
                    if other != self._rank and store.check([self._key(other)]):
                        self._heard[other] = store.get(self._key(other)).decode()
            except RuntimeError:
                store = None
            if is_over:
                return

    def _listen(self) -> None:
        silences = Silences([other for other in range(self._world_size) if other != self._rank])
        while not self._is_over.wait(self._seconds):
            silences.hear(dict(self._heard))
            if lost := silences.lost(self._most_missed):
                self._give_up(lost)
                return

    def _give_up(self, lost: Sequence[int]) -> None:
        names = ", ".join(f"rank {rank}" for rank in lost)
        print(
            f"fedbert-ds: {names}: silent for {(self._most_missed + 1) * self._seconds:.0f} s, frozen or cut off; the "
            "run ends, what is saved stays: start it again with --resume",
            file=sys.stderr,
            flush=True,
        )
        # The main thread may wait for the lost one in a collective that knows no end.
        self._end(RANK_LOST)

    def _key(self, rank: int) -> str:
        return f"fedbert/beat/{self._start}/{rank}"
