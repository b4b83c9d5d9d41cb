"""The naive trainer as a baseline of `bench pipeline`: two processes, a link between them."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from typing import Any

from fedbert_ds.bench.pipeline.reach import reach
from fedbert_ds.bench.pipeline.settings import RUN_FILE, Baseline, Run
from fedbert_ds.bench.process import last_line, running
from fedbert_ds.errors import RunError

CONNECTION_KEPT = "connection kept"
"""Kinder than `requests.post`, which opens a connection for each request."""
SECONDS, QUICK_SECONDS = 20.0, 3.0
"""Of training."""


def measure_naive(run: Run) -> dict[str, Any]:
    """A row of the record; RunError names the log of what failed."""
    options = run.options
    seconds = QUICK_SECONDS if options.quick else SECONDS
    trainer = [sys.executable, "-m", "benchmarks.naive.trainer"]
    common = ["--config", str(RUN_FILE), "--tokenizer", str(run.tokenizer)]
    with ExitStack() as resources:
        way = resources.enter_context(reach(run.setting.link, options))
        command = [*trainer, "serve", *common, "--host", way.host, *run.overrides]
        server = resources.enter_context(running(command, run.log, options.device, answers=True))
        # Clients start while the server does.
        command = [*way.enter, *trainer, "train", *common, "--shards", str(run.shards), "--server", "-"]
        command += ["--keep-connection"] if run.setting.variant == CONNECTION_KEPT else []
        command += ["--seconds", str(seconds), *run.overrides]
        process = running(command, run.clients_log, options.client_device, way.environment, answers=True)
        clients = resources.enter_context(process)
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        if not address:
            raise RunError(f"the naive server did not start (see {run.log})")
        measured = json.loads(last_line(clients, run.clients_log, address + "\n"))
    tokens = measured["tokens"]
    return run.row(
        tokens / measured["seconds"],
        measured["busy_seconds"] / measured["seconds"],
        cut="embeddings",
        codec="fp32, padded",
        bytes_per_token_up=measured["bytes_up"] / tokens,
        bytes_per_token_down=measured["bytes_down"] / tokens,
    )


NAIVE = Baseline("naive", ("", CONNECTION_KEPT), measure_naive)
