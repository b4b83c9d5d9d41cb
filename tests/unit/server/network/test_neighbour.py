"""Which process a client is, and whether it has ended."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil

from fedbert_ds.server.network.neighbour import has_ended, neighbour
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.shared_memory import offer


def test_a_process_is_a_neighbour_that_shows_its_memory() -> None:
    offered = offer()
    assert offered is not None
    memory, shared = offered
    process = neighbour(shared)
    assert process is not None and process.pid == os.getpid() and not has_ended(process)
    assert neighbour(pb.Shared(process=os.getpid(), descriptor=shared.descriptor, name="fedbert-another")) is None
    assert neighbour(pb.Shared(process=os.getppid(), descriptor=0, name="")) is None
    memory.close()
    assert neighbour(shared) is None


def test_a_process_has_ended_before_anybody_waited_for_it() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = psutil.Process(child.pid)
    assert not has_ended(process)
    child.kill()
    while process.status() != psutil.STATUS_ZOMBIE:
        pass
    assert has_ended(process)
    child.communicate()
    assert has_ended(process)
