"""Runs whose client model another party owns: the same to the bit as without, and nobody receives
what is the other party's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.cluster import CLIENTS, WINDOWS, ZERO, aggregator_section, run_file, run_jobs, write_text
from safetensors.torch import load_file
from torch import Tensor

from fedbert_ds.errors import ModelError
from fedbert_ds.model.halves import merge_folders

pytestmark = pytest.mark.timeout(900)

MODEL = {"dropout": 0.1}
PLAIN = {"wire": {"compression": "none"}}
MODES: dict[str, dict[str, Any]] = {
    "synchronous": {"optimizer": {"lr": 0.01, "gradient_clipping": 0.05}, **PLAIN},
    "parallel": {
        "federation": {
            "mode": "parallel",
            "average_every": 2,
            "average_scope": "embeddings",
            "personal_parts": "averaged",
        },
        **PLAIN,
    },
}
OTHERS: dict[str, dict[str, Any]] = {
    "adam-int8": {
        "federation": {"mode": "parallel", "server_optimizer": "adam", "server_lr": 0.02},
        "wire": {"updates": "int8"},
    },
    "sequential": {"federation": {"mode": "sequential", "average_every": 1}},
    "two-of-three": {"federation": {"participants": 2}, "optimizer": {"lr": 0.01, "gradient_clipping": 0.05}},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run of this file, in the same six processes."""
    folder = tmp_path_factory.mktemp("runs")
    data = write_text(folder)
    jobs: list[dict[str, Any]] = []

    def add(name: str, elsewhere: bool, resume: bool = False, mutation: str | None = None, **sections: Any) -> None:
        if elsewhere:
            sections["aggregator"] = aggregator_section(folder)
        body = {"deepspeed": str(ZERO / "zero2.json")}
        tree = run_file(folder, name, model=MODEL, window={"order": "fixed"}, body=body, **sections)
        record = elsewhere and name in MODES
        jobs.append({"config": tree, "resume": resume, "data": data, "mutation": mutation, "record": record})

    for name, sections in (MODES | OTHERS).items():
        add(f"{name}-here", False, **sections)
        add(name, True, **sections)
    # With staleness no run repeats bit for bit: a client works on with what has come by then.
    add("staleness", True, federation={"staleness": 1}, optimizer={"lr": 0.01, "gradient_clipping": 1.0})
    for name, sections in MODES.items():
        add(f"{name}-resumed", True, mutation="stopped before window 3", **sections)
        add(f"{name}-resumed", True, resume=True, **sections)
    run_jobs(folder, jobs)
    return folder


@pytest.mark.parametrize("name", [*MODES, *OTHERS, *(f"{mode}-resumed" for mode in MODES)])
def test_a_run_is_the_same_to_the_bit_as_with_the_aggregator_in_the_ranks(runs: Path, name: str) -> None:
    reference = f"{name.removesuffix('-resumed')}-here"
    losses = [_losses(runs / run) for run in (reference, name)]
    assert len(losses[0]) == WINDOWS and losses[0] == losses[1]
    merged = runs / f"{name}-merged"
    merge_folders(runs / name / "body", runs / f"{name}-aggregator" / "client_model.safetensors", merged)
    here, there = (load_file(model / "model.safetensors") for model in (runs / reference / "hf", merged))
    assert here.keys() == there.keys()
    assert [key for key in here if not torch.equal(here[key], there[key])] == []
    assert not (runs / name / "hf").exists(), "the server cannot merge"


def test_a_run_with_staleness_ends_too(runs: Path) -> None:
    assert len(_losses(runs / "staleness")) == WINDOWS
    assert (runs / "staleness-aggregator" / "client_model.safetensors").is_file()


def test_clipping_had_something_to_do(runs: Path) -> None:
    """A guard: otherwise the norms that cross say nothing."""
    name = "synchronous"
    reports = [frame for kind, frame in _record(runs, name, "rank-0") if kind == "report combined"]
    assert len(reports) == WINDOWS


@pytest.mark.parametrize("name", MODES)
def test_kinds_of_messages_stay_with_their_party(runs: Path, name: str) -> None:
    ranks = {kind for rank in (0, 1) for kind, _ in _record(runs, name, f"rank-{rank}")}
    assert ranks <= {"begun", "manifest", "activations", "gradient", "saved"} | {
        f"report {kind}" for kind in ("admitted", "delivered", "combined", "saved", "concluded")
    }
    assert {"manifest", "activations", "gradient", "report combined"} <= ranks
    aggregator = {kind for kind, _ in _record(runs, name, "aggregator")}
    orders = {f"order {kind}" for kind in ("admit", "begin", "expect", "commit", "save", "conclude", "finish", "drop")}
    assert {"update", "order expect"} <= aggregator <= {"update", "begun"} | orders


@pytest.mark.parametrize("name", MODES)
def test_no_value_of_the_other_partys_tensors_is_received(runs: Path, name: str) -> None:
    ranks = b"".join(frame for rank in (0, 1) for _, frame in _record(runs, name, f"rank-{rank}"))
    aggregator = b"".join(frame for _, frame in _record(runs, name, "aggregator"))
    for client in CLIENTS:
        for kind, payload in _record(runs, name, client):
            own, other = (aggregator, ranks) if kind == "update" else (ranks, aggregator)
            parts = [payload[start : start + 32] for start in range(0, len(payload) - 31, 32)]
            parts = [part for part in parts if len(set(part)) > 8]  # rows of zeros are everywhere
            assert all(part in own for part in parts[:40]), "a guard: the search finds what is there"
            assert not any(part in other for part in parts), kind
    client_model = load_file(runs / f"{name}-aggregator" / "client_model.safetensors")
    body = load_file(runs / name / "body" / "body.safetensors")
    assert _rows(client_model) and not any(row in ranks for row in _rows(client_model))
    assert _rows(body) and not any(row in aggregator for row in _rows(body))


def test_halves_of_different_ends_do_not_merge(runs: Path, tmp_path: Path) -> None:
    client_model = runs / "synchronous-aggregator" / "client_model.safetensors"
    with pytest.raises(ModelError, match="exists"):
        merge_folders(runs / "synchronous" / "body", client_model, tmp_path)
    with pytest.raises(ModelError, match="no half of a run"):
        merge_folders(runs / "synchronous-here" / "hf", client_model, tmp_path / "new")


def _record(runs: Path, name: str, who: str) -> list[tuple[str, bytes]]:
    lines = (line.split("\t") for line in (runs / name / f"record-{who}.txt").read_text().splitlines())
    return [(kind, bytes.fromhex(content)) for kind, content in lines]


def _rows(tensors: dict[str, Tensor]) -> list[bytes]:
    """The bytes of some rows of each matrix, 32 bytes each."""
    matrices = [tensor for tensor in tensors.values() if tensor.dim() == 2]
    return [row.contiguous().numpy().tobytes()[:32] for matrix in matrices for row in matrix[::5]]


def _losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
