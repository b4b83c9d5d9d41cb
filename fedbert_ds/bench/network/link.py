"""Network links to measure over: a TCP proxy in its own process that delays, limits and cuts.

    with DelayProxy("127.0.0.1:29600", delay_ms=25, mbit=100) as address:
        ...                                                         # connect to `address` instead

Without a target it speaks HTTP CONNECT, which gRPC follows when its environment says `http_proxy`:
then a client reaches every address through its link, those that it is only told later (its rank's
endpoint) too:

    with DelayProxy(delay_ms=25, mbit=100) as address:
        subprocess.Popen(client, env=os.environ | through(address))

What it does not imitate: TCP's own slow start and losses, since each side speaks TCP with the proxy
on this machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import asdict
from typing import Any

from fedbert_ds.bench.network.proxy import LinkSettings


def through(address: str) -> dict[str, str]:
    """Environment variables that lead a client's gRPC through a proxy without a target."""
    return {"http_proxy": f"http://{address}", "no_proxy": "", "no_grpc_proxy": ""}


class DelayProxy:
    """A link from this machine to itself, one for each connection; use as a context manager.

    `target` is host:port, None for HTTP CONNECT; `limits` are the other fields of LinkSettings.
    """

    def __init__(self, target: str | None = None, **limits: Any) -> None:
        self._settings = LinkSettings(target, **limits)
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self.address = ""
        """host:port, once started."""

    def __enter__(self) -> str:
        command = [sys.executable, "-m", "fedbert_ds.bench.network.proxy", json.dumps(asdict(self._settings))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.address = self._answer()
        return self.address

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            assert self._process.stdin is not None and self._process.stdout is not None
            # It ends with its input, so it does not outlive this process either.
            self._process.stdin.close()
            self._process.wait(timeout=30)
            self._process.stdout.close()

    def drop(self, outage_ms: float = 0.0) -> None:
        """Cut every connection now, and close new ones at once for a while."""
        self._ask({"drop": outage_ms})

    def counts(self) -> dict[str, int]:
        """`connections` opened, `cuts`, `bytes_up` and `bytes_down` delivered, so far."""
        counts: dict[str, int] = self._ask({"counts": True})
        return counts

    def _ask(self, request: dict[str, Any]) -> Any:
        with self._lock:
            assert self._process is not None and self._process.stdin is not None
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return self._answer()

    def _answer(self) -> Any:
        assert self._process is not None and self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the link's process ended with code {self._process.wait(timeout=30)}")
        return json.loads(line)
