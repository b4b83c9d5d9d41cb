"""User mistakes: one line that says what to change, a non-zero exit, nothing left running."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from integration.chaos_process import run_process
from integration.cluster import run_file, write_text
from integration.processes import PROCESSES, fork_quickly

from fedbert_ds.data.corpus import Article
from fedbert_ds.data.tokenizer import train_wordpiece
from fedbert_ds.wire.messages import PROTOCOL

pytestmark = pytest.mark.timeout(300)

PRETRAIN = Path(__file__).resolve().parents[2] / "launchers" / "pretrain.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bad-input")
    write_text(folder)
    return folder


def test_an_unknown_key_names_the_nearest(folder) -> None:
    tree = run_file(folder, "unknown-key")
    tree["body"]["zero_stgae"] = 2
    _expect_failure(_pretrain(folder, tree), "body.zero_stgae is not a key; did you mean body.zero_stage?")


def test_a_missing_data_file(folder) -> None:
    tree = run_file(folder, "missing-data", data={"source": [str(folder / "nowhere.txt")]}, clients={"local": 1})
    _expect_failure(_forked_pretrain(folder, tree), "nowhere.txt")
    assert not (folder / "missing-data").exists()


def test_a_head_count_that_does_not_divide_the_width(folder) -> None:
    tree = run_file(folder, "heads", model={"hidden_size": 32, "num_attention_heads": 5})
    _expect_failure(_pretrain(folder, tree), "num_attention_heads 5 does not divide hidden_size 32")


def test_a_sequence_longer_than_the_position_table(folder) -> None:
    tree = run_file(folder, "long", data={"sequence_length": 64})
    _expect_failure(_pretrain(folder, tree), "data.sequence_length 64 is longer than the position table")


def test_a_deepspeed_file_that_sets_what_the_run_file_owns(folder) -> None:
    (folder / "clipping.json").write_text('{"gradient_clipping": 1.0}')
    tree = run_file(folder, "clipping", body={"deepspeed": str(folder / "clipping.json")})
    _expect_failure(_pretrain(folder, tree), "gradient_clipping belongs to the run file")


@pytest.mark.skipif(torch.cuda.is_available(), reason="here Triton can run")
def test_triton_kernels_without_a_gpu(folder) -> None:
    tree = run_file(folder, "no-gpu") | {"kernels": "triton"}
    refusal = "kernels: triton needs a GPU, and there is none here; set kernels: auto"
    _expect_failure(_forked_pretrain(folder, tree), refusal)
    assert not (folder / "no-gpu").exists()


def test_a_folder_that_holds_a_run_already(folder) -> None:
    (folder / "taken").mkdir()
    (folder / "taken" / "config.yaml").write_text("{}")
    _expect_failure(_pretrain(folder, run_file(folder, "taken")), "holds a run already; add --resume")
    assert (folder / "taken" / "config.yaml").read_text() == "{}"


def test_resuming_what_was_never_started(folder) -> None:
    _expect_failure(_pretrain(folder, run_file(folder, "nothing-here"), "--resume"), "no run to resume here")
    assert not (folder / "nothing-here").exists()


def test_a_port_in_use(folder) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        tree = run_file(folder, "port", server={"port": port})
        _expect_failure(_forked_pretrain(folder, tree), f"127.0.0.1:{port}", "server.port")
    assert not (folder / "port").exists()


def test_an_unreachable_server(folder) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        server = f"127.0.0.1:{unused.getsockname()[1]}"
        refused = _forked(folder, "ada", *_options(folder, server, "--connect-timeout", "1"))
        _expect_failure(refused, f"{server}: no server answers")


def test_clients_that_do_not_fit_are_refused_and_the_run_goes_on_without_them(folder) -> None:
    """An empty shard, another vocabulary, model, cut and protocol; then a good client, and the run
    completes."""
    (folder / "empty.jsonl").write_text("")
    other = folder / "other-tokenizer"
    train_wordpiece([Article("other", "entirely different words " * 50)], 120).save_pretrained(other)
    (folder / "other-model").mkdir()
    (folder / "other-model" / "config.json").write_text('{"model_type": "bert", "hidden_size": 48}')
    tree = run_file(
        folder, "one-client", run={"windows": 2}, clients={"expected": 1, "join_timeout": 280}, window={"tokens": 200}
    )
    with _running(folder, tree) as (server, address):
        outcomes = _clients(
            folder,
            [
                _options(folder, address, data="empty.jsonl"),
                _options(folder, address, "--tokenizer", str(other)),
                _options(folder, address, "--model", str(folder / "other-model")),
                _options(folder, address, "--cut", "rows"),
                _options(folder, address),
                _options(folder, address),
            ],
            protocols={4: 99},
        )
        expected = [
            "empty.jsonl",
            "another vocabulary than the run",
            "another model than the run",
            "insists on cut",
            f"speaks protocol 99, this server {PROTOCOL}",
        ]
        for outcome, part in zip(outcomes, expected, strict=False):
            _expect_one_line(outcome["exit"], outcome["stderr"], part)
        assert outcomes[-1]["exit"] == 0, outcomes[-1]["stderr"]
        server.join(60)
        assert server.exitcode == 0


@pytest.mark.parametrize(
    ("optimizer", "zero_stage", "reason"),
    [
        ({"name": "sgd", "lr": 1e30, "warmup_windows": 0}, 1, "not finite; lower optimizer.lr"),
        ({"name": "sgd", "lr": 1e30, "warmup_windows": 0}, 3, "not finite; lower optimizer.lr"),
        ({"name": "adamw", "lr": 1e5, "warmup_windows": 0}, 1, "masked tokens; lower optimizer.lr"),
    ],
)
def test_a_learning_rate_far_too_high_is_named(folder, optimizer, zero_stage, reason) -> None:
    tree = run_file(
        folder,
        f"diverged-{optimizer['name']}-{zero_stage}",
        optimizer=optimizer,
        body={"zero_stage": zero_stage},
        data={"source": [str(folder / "ada.jsonl")], "sequence_length": 32},
        clients={"local": 2, "expected": 2},
        window={"tokens": 200},
    )
    _expect_failure(_pretrain(folder, tree), reason)


def _run_file(folder: Path, tree: dict) -> Path:
    path = folder / f"{Path(tree['run']['directory']).name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def _pretrain(folder: Path, tree: dict, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(PRETRAIN), "--config", str(_run_file(folder, tree)), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=_environment())


def _forked_pretrain(folder: Path, tree: dict) -> subprocess.CompletedProcess:
    """The same for mistakes found after torch is imported: it is there already."""
    return _forked(folder, "rank 0", "--config", str(_run_file(folder, tree)))


def _forked(folder: Path, who: str, *arguments: str) -> subprocess.CompletedProcess:
    process, log = _fork(folder, who, *arguments)
    try:
        process.join(120)
        assert process.exitcode is not None, log.read_text()
    finally:
        process.kill()
        process.join()
    return subprocess.CompletedProcess(arguments, process.exitcode, stderr=log.read_text())


def _fork(folder: Path, who: str, *arguments: str) -> tuple[BaseProcess, Path]:
    """A started process, and the file that its output goes to."""
    log = folder / f"{who}.log"
    log.unlink(missing_ok=True)
    fork_quickly()
    process = PROCESSES.Process(target=run_process, args=(who, list(arguments), {}, log, []))
    process.start()
    return process, log


@contextmanager
def _running(folder: Path, tree: dict) -> Iterator[tuple[BaseProcess, str]]:
    server, log = _fork(folder, "rank 0", "--config", str(_run_file(folder, tree)))
    try:
        address = Path(tree["run"]["directory"]) / "server.address"
        deadline = time.monotonic() + 90
        while not address.is_file():
            assert server.is_alive() and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield server, address.read_text().strip()
    finally:
        server.kill()
        server.join()


def _options(folder: Path, server: str, *arguments: str, data: str = "ada.jsonl") -> list[str]:
    options = ["--server", server, "--data", str(folder / data), "--id", "ada", "--state", str(folder / "state-ada")]
    return ["client", *options, *arguments]


CLIENTS = """
import contextlib, io, json, sys
import fedbert_ds.client.session as session
from fedbert_ds.cli import main
protocol = session.PROTOCOL
outcomes = []
for number, (arguments, changed) in enumerate(json.loads(sys.argv[1])):
    session.PROTOCOL = changed or protocol
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            main(arguments)
            code = 0
        except SystemExit as end:
            code = end.code
    outcomes.append({"exit": code, "stderr": said.getvalue()})
print(json.dumps(outcomes))
"""
"""Client commands in one process, which imports torch once: exit code and stderr of each."""


def _clients(folder: Path, commands: list[list[str]], protocols: dict[int, int]) -> list[dict]:
    work = [(command, protocols.get(number)) for number, command in enumerate(commands)]
    command = [sys.executable, "-c", CLIENTS, json.dumps(work)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240, env=_environment())
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


def _environment() -> dict[str, str]:
    alone = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    return alone | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def _expect_failure(process: subprocess.CompletedProcess, *parts: str) -> None:
    """One line of ours with every part, no traceback, a non-zero exit, no process of it left."""
    _expect_one_line(process.returncode, process.stderr, *parts)
    command = process.args
    marks = [value for option, value in itertools.pairwise(command) if option in ("--config", "--state")]
    left = [p for p in psutil.process_iter(["cmdline"]) if any(mark in (p.info["cmdline"] or []) for mark in marks)]
    assert left == []


def _expect_one_line(exit_code: int | None, stderr: str, *parts: str) -> None:
    ours = [line for line in stderr.splitlines() if line.startswith("fedbert-ds: ")]
    assert exit_code not in (0, None), stderr
    assert len(ours) == 1 and "Traceback" not in stderr, stderr
    for part in parts:
        assert part in ours[0], ours[0]
