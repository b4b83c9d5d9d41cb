"""One run of ours over a link: the real server with one rank, and real clients in one process."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from typing import Any

from fedbert_ds.bench.pipeline.bound import exchange_work, window_end_seconds
from fedbert_ds.bench.pipeline.reach import reach
from fedbert_ds.bench.pipeline.settings import RUN_FILE, Run
from fedbert_ds.bench.process import LONGEST_SECONDS, running, tell
from fedbert_ds.errors import RunError
from fedbert_ds.server.run_folder import RunFolder
from fedbert_ds.telemetry.metrics import read_metrics, summary
from fedbert_ds.telemetry.timeline import read_trace, shares

SETTLING_WINDOWS = 3
"""Not counted: in them the queue learns the round trips."""
START_SECONDS = 240.0


def measure_ours(run: Run) -> dict[str, Any]:
    """Run it and read what it left; a row of the record. RunError names the log of what failed."""
    train(run)
    return row_of(run)


def train(run: Run) -> None:
    """Start the server, then clients behind the link, and wait until both have ended."""
    options = run.options
    state = run.folder.with_name(f"{run.folder.name}.state")
    for folder in (run.folder, state):
        shutil.rmtree(folder, ignore_errors=True)
    with ExitStack() as resources:
        way = resources.enter_context(reach(run.setting.link, options))
        own = [*run.overrides, f"run.directory={run.folder}", f"server.host={way.host}"]
        command = [sys.executable, "-m", "fedbert_ds.server.pretrain", "--config", str(RUN_FILE), *own]
        server = resources.enter_context(running(command, run.log, options.device))
        # Clients start while the server does.
        command = [*way.enter, sys.executable, "-m", "fedbert_ds.bench.pipeline.load", "--server", "-"]
        command += ["--shards", str(run.shards), "--state", str(state), "--device", options.client_device]
        clients = resources.enter_context(running(command, run.clients_log, options.client_device, way.environment))
        tell(clients, _address(run, server))
        _wait(server, clients, run)


def row_of(run: Run) -> dict[str, Any]:
    """The row of a finished run, from its metrics and its timeline."""
    config = run.config
    windows = read_metrics(RunFolder(run.folder).metrics)[SETTLING_WINDOWS:]
    whole = summary(windows)
    spent = shares(read_trace(RunFolder(run.folder).trace(0)), windows[0].window, windows[-1].window)
    update_bytes = whole.update_bytes_per_token * whole.tokens / len(windows) / config.clients.expected
    end = window_end_seconds(spent, config, run.setting.link, update_bytes, lambda: _exchange_work(run))
    busy_seconds = whole.busy_share * whole.seconds
    return run.row(
        whole.tokens_per_second,
        whole.busy_share,
        mode=config.federation.mode,
        staleness=config.federation.staleness,
        utilization_bound=busy_seconds / (busy_seconds + end * len(windows)),
        bytes_per_token_up=whole.bytes_per_token_up,
        bytes_per_token_down=whole.bytes_per_token_down,
        dummy_share=whole.dummy_share,
        bytes_per_token_averaging=whole.update_bytes_per_token,
        window_tokens=whole.tokens / len(windows),
        micro_batches=spent.micro_batches / len(windows),
        seconds={
            "forward": spent.forward / whole.tokens,
            "backward": spent.backward / whole.tokens,
            "messages": spent.messages / spent.micro_batches,
            "step": spent.step / len(windows),
            "gather": spent.gather / len(windows),
            "wait": spent.wait / len(windows),
            "activations": spent.activations,
            "gradient": spent.gradient,
        },
    )


def _exchange_work(run: Run) -> Any:
    from fedbert_ds.data.tokenizer import load_tokenizer

    return exchange_work(run.config, load_tokenizer(str(run.tokenizer)))


def _address(run: Run, server: subprocess.Popen[str]) -> str:
    path, deadline = RunFolder(run.folder).address, time.monotonic() + START_SECONDS
    while not path.is_file():
        if server.poll() is not None or time.monotonic() > deadline:
            raise RunError(f"the server did not start (see {run.log})")
        time.sleep(0.05)
    return path.read_text().strip()


def _wait(server: subprocess.Popen[str], clients: subprocess.Popen[str], run: Run) -> None:
    deadline = time.monotonic() + LONGEST_SECONDS
    while server.poll() is None:
        if clients.poll() not in (None, 0):
            raise RunError(f"clients failed (see {run.clients_log})")
        if time.monotonic() > deadline:
            raise RunError(f"a run took more than {LONGEST_SECONDS / 60:.0f} minutes (see {run.log})")
        time.sleep(0.1)
    if server.returncode:
        raise RunError(f"the server failed (see {run.log})")
