"""`fedbert-ds compare` with real ranks and clients: Ctrl-C ends it in order, it goes on where it
was saved, and `synchronous` is centralized training for every owner."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from unit.compare.small import tree

from fedbert_ds.compare.runs import RESULT
from fedbert_ds.compare.systems import NAMES
from fedbert_ds.server.run_folder import RunFolder
from fedbert_ds.telemetry.metrics import read_metrics

pytestmark = pytest.mark.timeout(600)

SYSTEMS = ("centralized", "synchronous")


def command(folder: Path, **sections: object) -> list[str]:
    (folder / "run.yaml").write_text(yaml.safe_dump(tree(folder, **sections)))
    program = [
        sys.executable,
        "-m",
        "fedbert_ds.cli",
        "compare",
        str(folder / "run.yaml"),
        "--out",
        str(folder / "out"),
    ]
    return [*program, "--systems", *SYSTEMS]


def windows_of(run: Path) -> list[int]:
    """The windows that a run has trained."""
    metrics = RunFolder(run).metrics
    return [one.window for one in read_metrics(metrics)] if metrics.is_file() else []


def ours(folder: Path) -> list[psutil.Process]:
    """Processes whose command names this folder."""
    return [one for one in psutil.process_iter(["cmdline"]) if any(str(folder) in s for s in one.info["cmdline"] or ())]


def test_an_interrupted_comparison_goes_on_and_synchronous_is_centralized(tmp_path: Path) -> None:
    given = command(tmp_path, run={"windows": 40}, optimizer={"lr": 3e-3, "gradient_clipping": 1.0})
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    folders = {name: tmp_path / "out" / "seed-3" / name for name in SYSTEMS}
    process = subprocess.Popen(
        given, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        # A shell lets what it starts in the background ignore Ctrl-C, and the tests may be such.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 300
        while len(windows_of(folders["synchronous"])) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 130 and "the same command goes on" in output, output
    assert "Traceback" not in output
    assert not ours(tmp_path), "no rank and no client is left"
    assert (folders["centralized"] / RESULT).is_file() and not (folders["synchronous"] / RESULT).exists()

    again = subprocess.run(given, env=environment, capture_output=True, text=True, timeout=400)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "centralized: complete already" in again.stdout
    goes_on = re.search(r"synchronous: goes on at window (\d+) of 40", again.stdout)
    assert goes_on is not None and int(goes_on[1]) >= 3, again.stdout
    assert windows_of(folders["synchronous"]) == list(range(40))
    rows = {row["system"]: row for row in json.loads((tmp_path / "out" / "table.json").read_text())["rows"]}
    for owner in ("ward", "lab"):
        plain, federated = (rows[name]["held_out"][owner] for name in SYSTEMS)
        assert federated == pytest.approx(plain, abs=2e-5)
    assert rows["synchronous"]["tokens"] == rows["centralized"]["tokens"]
    assert rows["synchronous"]["bytes_per_token"] > 0 == rows["centralized"]["bytes_per_token"]
    # Told with two digits of a million, it is 0.00 at this size.
    assert rows["synchronous"]["client_flops_per_token"] < rows["centralized"]["client_flops_per_token"]


def test_a_mistake_is_one_line_before_anything_is_written(tmp_path: Path) -> None:
    given = [*command(tmp_path), "fedsgd"]
    refused = subprocess.run(given, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2
    assert refused.stderr.strip() == f"fedbert-ds: --systems fedsgd: choose {', '.join(NAMES)}"
    assert not (tmp_path / "out").exists()
