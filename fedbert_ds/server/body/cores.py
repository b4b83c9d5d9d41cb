"""Which of a node's cores a rank has: those near its GPU, shared with ranks that are as near.

No launcher binds ranks by default. Unbound, a rank's threads wander to cores whose memory is far
from its GPU, and torchrun gives a rank one thread of however many cores there are.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Cores = frozenset[int]

DEVICES = Path("/sys/bus/pci/devices")


@dataclass(frozen=True)
class Place:
    """Where a rank runs."""

    node: str
    """The node's name."""
    allowed: Cores
    """Cores that the rank may use as it was launched; none where the system does not tell."""
    near: Cores
    """Cores near its GPU; none where that is not known."""


def place_of(node: str, gpu: int | None) -> Place:
    """This rank's place; no GPU is None."""
    if gpu is None:
        return Place(node, allowed_cores(), frozenset())
    properties: Any = torch.cuda.get_device_properties(gpu)
    try:
        address = f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
    except AttributeError:  # torch before 2.8
        return Place(node, allowed_cores(), frozenset())
    return Place(node, allowed_cores(), cores_in(DEVICES / address / "local_cpulist"))


def share_of(rank: int, places: Sequence[Place]) -> Cores:
    """The rank's cores, of all ranks' places. None where the system does not tell which there are.

    A rank that its launcher has bound keeps its cores.
    """
    mine, sharing = _shared(rank, places)
    cores, place = sorted(mine), sharing.index(rank)
    if len(cores) < len(sharing):
        return mine
    return frozenset(cores[place * len(cores) // len(sharing) : (place + 1) * len(cores) // len(sharing)])


def codec_threads(rank: int, places: Sequence[Place]) -> int:
    """Threads of a rank that decompress what arrives, and as many that compress what leaves: its
    part of the cores that it shares, bound or not; at least 1.
    """
    mine, sharing = _shared(rank, places)
    return max(1, len(mine) // len(sharing))


def threads_for(cores: Cores, environment: Mapping[str, str]) -> int | None:
    """Threads for an operation on the CPU; None where OMP_NUM_THREADS says it."""
    asked = environment.get("OMP_NUM_THREADS")
    # torchrun sets it to 1 where the user has not set it.
    by_torchrun = asked == "1" and "TORCHELASTIC_RUN_ID" in environment
    return len(cores) if cores and (asked is None or by_torchrun) else None


def threads_asked_for(environment: Mapping[str, str]) -> int | None:
    """OMP_NUM_THREADS of the outermost level, at least 1; None where it is not set."""
    text = environment.get("OMP_NUM_THREADS")
    return None if text is None else max(1, int(text.partition(",")[0]))


def bind(cores: Cores) -> None:
    """Have all threads of this process, and those to come, run on these cores."""
    for thread in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(int(thread.name), cores)


@contextmanager
def children_on(cores: Collection[int]) -> Iterator[None]:
    """Processes that this thread starts inside may use these cores; none: those it has."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def allowed_cores() -> Cores:
    """Cores that this thread may use; none where the system does not tell."""
    return frozenset(os.sched_getaffinity(0)) if sys.platform == "linux" else frozenset()


def cores_in(file: Path) -> Cores:
    """Cores that a file of the kernel lists, as in 0-15,32-47; none if there is no such file."""
    try:
        ranges = [part.split("-") for part in file.read_text().strip().split(",") if part]
    except OSError:
        return frozenset()
    return frozenset(core for bounds in ranges for core in range(int(bounds[0]), int(bounds[-1]) + 1))


def _shared(rank: int, places: Sequence[Place]) -> tuple[Cores, list[int]]:
    """The cores that a rank may use, and the ranks of its node that may use the same."""
    mine = _eligible(places[rank])
    here = [other for other, place in enumerate(places) if place.node == places[rank].node]
    return mine, [other for other in here if _eligible(places[other]) == mine]


def _eligible(place: Place) -> Cores:
    return place.allowed & place.near or place.allowed
