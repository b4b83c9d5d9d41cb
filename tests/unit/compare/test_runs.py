"""Runs are made once, ended with the command, and say what went wrong."""

import os
import subprocess
import sys
import time

import pytest

from fedbert_ds.compare.runs import ClientCosts, client_costs


def test_costs_are_read_from_what_clients_print(tmp_path):
    logs = [tmp_path / name for name in ("a.txt", "b.txt")]
    assert client_costs([]) is None
    for log, name, memory, flops in zip(logs, "ab", (512, 688), ("0.45", "2.13"), strict=True):
        log.write_text(f"client {name}: the run is complete; peak memory {memory} MB, {flops} MFLOP per token\n")
    assert client_costs(logs) == ClientCosts(flops_per_token=2.13e6, peak_memory_mb=688)


def test_a_run_is_ended_with_the_bench(tmp_path):
    program = (
        "import signal, sys\nfrom pathlib import Path\nfrom fedbert_ds.compare.runs import run_to_end\n"
        "signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))\n"
        "child = 'import os, time; print(os.getpid(), flush=True); time.sleep(60)'\n"
        "run_to_end([sys.executable, '-c', child], Path(sys.argv[1]))\n"
    )
    log = tmp_path / "run.log"
    bench = subprocess.Popen([sys.executable, "-c", program, str(log)])
    try:
        deadline = time.monotonic() + 60
        while not (log.is_file() and log.read_text().strip()):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        bench.terminate()
        assert bench.wait(timeout=60) == 143
    finally:
        bench.kill()
        bench.wait()
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)
