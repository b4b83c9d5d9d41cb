"""A listening process for tests that attack it: its limits, memory and descriptors are its own.

    python endpoint_worker.py OPTIONS        OPTIONS is JSON

It prints its port, then answers each line of its input with a line of JSON about itself. It admits
ada and cy, whose messages it answers, and bo, whose it does not; joins it refuses.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path

from fedbert_ds.errors import WireError
from fedbert_ds.server.network import limits
from fedbert_ds.server.network.endpoint import Endpoint
from fedbert_ds.server.network.events import Disconnected, JoinAsked, Received, reply
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.channel import TlsFiles

COUNTS: Counter[str] = Counter()
REASONS: list[str] = []


def attend(endpoint: Endpoint) -> None:
    """Take events for ever."""
    while True:
        match endpoint.next_event(1.0):
            case JoinAsked(_, answer):
                COUNTS["joins"] += 1
                reply(answer, WireError("no"))
            case Received(client, message) if client != "bo":
                endpoint.send(client, pb.ServerMessage(save=pb.Save(window=message.manifest.window)))
            case Disconnected(_, reason):
                REASONS.append(reason)


def peak_mb() -> float:
    """Most memory that this process has had. (That of `getrusage` begins with its parent's.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM:"))


def state() -> dict[str, object]:
    """What this process has, and whether it can still write a file, as a checkpoint needs."""
    try:
        with tempfile.TemporaryFile() as file:
            file.write(b"weights")
        writes = True
    except OSError:
        writes = False
    return {
        "writes": writes,
        "descriptors": len(list(Path("/proc/self/fd").iterdir())) if writes else -1,
        "peak_mb": peak_mb(),
        "joins": COUNTS["joins"],
        "reasons": REASONS,
    }


def main(options: dict[str, object]) -> None:
    """Listen until the input ends."""
    if most := options.get("descriptors"):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # type: ignore[arg-type]
    for name, value in options.get("limits", {}).items():  # type: ignore[attr-defined]
        setattr(limits, name, value)
    tls = [Path(path) for path in options.get("tls", ())]  # type: ignore[attr-defined]
    endpoint = Endpoint("127.0.0.1", 0, TlsFiles(*tls) if tls else None)
    port = endpoint.start()
    endpoint.keep_at_most(int(options.get("most_kept", 1 << 40)))  # type: ignore[call-overload]
    endpoint.admit({name: f"session of {name}" for name in ("ada", "bo", "cy")})
    threading.Thread(target=attend, args=(endpoint,), daemon=True).start()
    print(port, flush=True)
    for line in sys.stdin:
        if line.startswith("send "):
            endpoint.send("bo", pb.ServerMessage(update=pb.UpdateChunk(payload=bytes(int(line.split()[1])))))
        print(json.dumps(state()), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
