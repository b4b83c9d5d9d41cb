"""Clients that hold the whole model: equal to centralized training, and FedAvg, DiLoCo and MuLoCo
from start over a stop to the merged model. Real processes, real gRPC, 2 ranks, 3 unequal clients.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.cluster import CLIENTS, WINDOWS, Centralized, run_file, run_jobs, write_text
from torch import Tensor
from transformers import AutoModelForMaskedLM

from fedbert_ds.client.state import load_state, saved_windows
from fedbert_ds.server.checkpoint import read_client_model
from fedbert_ds.server.checkpoint_folder import CheckpointFolder

pytestmark = pytest.mark.timeout(900)

SGD = {"name": "sgd", "lr": 0.5}
ROUNDS, LOCAL_STEPS = 3, 2
STOPPED = 3
"""A window inside a round: clients resume with steps that no average has."""
PARALLEL = {"mode": "parallel", "average_every": LOCAL_STEPS}
MODES: dict[str, dict[str, Any]] = {
    "fedavg": {"federation": {**PARALLEL, "proximal": 0.01}, "wire": {"updates": "bf16"}},
    "diloco": {"federation": {**PARALLEL, "server_optimizer": "nesterov"}, "optimizer": {"gradient_clipping": 1.0}},
    "muloco": {
        "federation": {**PARALLEL, "server_optimizer": "nesterov"},
        "optimizer": {"name": "muon", "lr": 0.02},
        "wire": {"updates": "int2_hadamard"},
    },
}
MODEL = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "dropout": 0.1,
         "max_position_embeddings": 40}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """Every run of this file, in the same five processes."""
    folder = tmp_path_factory.mktemp("whole")
    data = write_text(folder)
    jobs: list[dict[str, Any]] = []

    def add(name: str, resume: bool = False, mutation: str | None = None, **sections: Any) -> None:
        tree = run_file(folder, name, cut="whole", **sections)
        jobs.append({"config": tree, "resume": resume, "data": data, "mutation": mutation})

    add("sgd", optimizer=SGD, federation={"mode": "parallel"})
    for name, sections in MODES.items():
        sections = {**sections, "model": MODEL, "run": _run(folder, f"{name}-undisturbed")}
        add(f"{name}-undisturbed", **sections)
        sections["run"] = _run(folder, f"{name}-resumed")
        add(f"{name}-resumed", mutation=f"stopped before window {STOPPED}", **sections)
        add(f"{name}-resumed", resume=True, **sections)
    run_jobs(folder, jobs, timeout=800.0)
    return folder, data


def _run(folder: Path, name: str) -> dict[str, Any]:
    return {"directory": str(folder / name), "windows": ROUNDS * LOCAL_STEPS, "save_every": 1000, "seed": 3}


def test_plain_sgd_averaged_every_window_equals_centralized_training(runs) -> None:
    """The mean of clients' steps, by masked tokens, is the step along the common gradient."""
    folder, data = runs
    centralized = Centralized(run_file(folder, "centralized", optimizer=SGD), data)
    expected = centralized.train()
    found = _weights(folder / "sgd")
    assert found.keys() == expected.keys()
    assert max(float((found[name] - expected[name]).abs().max()) for name in expected) < 1e-5
    start = Centralized(run_file(folder, "centralized", optimizer=SGD), data).model.state_dict()
    assert max(float((found[name] - start[name]).abs().max()) for name in expected) > 1e-2, "nothing was trained"


def test_every_token_is_reported_and_none_crosses_but_in_updates(runs) -> None:
    folder, _ = runs
    rows = _metrics(folder / "sgd")
    assert len(rows) == WINDOWS
    for row in rows:
        assert row["tokens"] > 500 and row["masked_tokens"] > 50 and row["lost_masked_tokens"] == 0
        assert row["forwards"] == row["backwards"] == row["dummy_micro_batches"] == 0
        assert row["bytes_up"] + row["bytes_down"] < 1000 < row["update_bytes_up"]


@pytest.mark.parametrize("name", MODES)
def test_a_run_stopped_inside_a_round_ends_as_an_undisturbed_one_bit_for_bit(runs, name) -> None:
    folder, _ = runs
    whole, resumed = folder / f"{name}-undisturbed", folder / f"{name}-resumed"
    assert CheckpointFolder(resumed / "checkpoints").complete_windows() == {STOPPED, ROUNDS * LOCAL_STEPS}
    assert [row["loss"] for row in _metrics(whole)] == [row["loss"] for row in _metrics(resumed)]
    one, other = _weights(whole), _weights(resumed)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", MODES)
def test_the_result_is_the_reference_and_a_round_leaves_all_clients_there(runs, name) -> None:
    folder, _ = runs
    run, last = folder / f"{name}-undisturbed", ROUNDS * LOCAL_STEPS
    model = _weights(run)
    halves = [_half(run, client, last) for client in CLIENTS]
    shapes = {key: tuple(tensor.shape) for key, tensor in halves[0].items()}
    reference, books = read_client_model(CheckpointFolder(run / "checkpoints").client_model(last), shapes)
    assert reference.version == last and books.cursors.keys() == CLIENTS.keys()
    for key, tensor in reference.weights.items():
        assert torch.equal(model[key], tensor), key
        for client, half in zip(CLIENTS, halves, strict=True):
            assert torch.equal(half[key], tensor), (client, key)


@pytest.mark.parametrize("name", MODES)
def test_it_learns(runs, name) -> None:
    folder, _ = runs
    losses = [row["loss"] for row in _metrics(folder / f"{name}-undisturbed")]
    assert losses[-1] < losses[0] - 0.03, losses


def test_changes_of_two_bits_are_a_sixth_of_exact_ones(runs) -> None:
    """2.25 bits instead of 32; biases and LayerNorm stay exact, and zstd takes some of both."""
    folder, _ = runs
    exact, coded = (
        sum(row["update_bytes_up"] + row["update_bytes_down"] for row in _metrics(folder / f"{name}-undisturbed"))
        for name in ("diloco", "muloco")
    )
    assert coded < exact / 6


def test_updates_cross_once_a_round(runs) -> None:
    folder, _ = runs
    up = [row["update_bytes_up"] for row in _metrics(folder / "diloco-undisturbed")]
    assert all(up[1::2]) and not any(up[::2])


def test_clients_keep_the_local_moments(runs) -> None:
    folder, _ = runs
    run = folder / "muloco-resumed"
    assert saved_windows(run / "clients" / "ada")
    state = load_state(run / "clients" / "ada", ROUNDS * LOCAL_STEPS)["optimizer"]
    keys = {name: set(values) for name, values in state.items()}
    assert keys["bert.encoder.layer.0.intermediate.dense.weight"] == {"step", "momentum"}
    assert keys["bert.embeddings.word_embeddings.weight"] == {"step", "exp_avg", "exp_avg_sq"}


def _weights(run: Path) -> dict[str, Tensor]:
    return dict(AutoModelForMaskedLM.from_pretrained(run / "hf").state_dict())


def _metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _half(run: Path, client: str, window: int) -> dict[str, Tensor]:
    half: dict[str, Tensor] = load_state(run / "clients" / client, window)["half"]
    return half
