"""Runs in which not everybody takes part: equal to one process that trains on the same text, and
resumed in the middle of a turn or round bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.cluster import ZERO, Centralized, run_file, run_jobs, write_text
from integration.one_after_another import OneAfterAnother
from torch import Tensor
from transformers import AutoModelForMaskedLM

from fedbert_ds.client.state import load_state, saved_windows
from fedbert_ds.federation.strategy import strategy_of_run
from fedbert_ds.run_file import parse_config

pytestmark = pytest.mark.timeout(900)

CLIENTS = {"ada": 9, "bo": 5, "cy": 2, "di": 4}
WINDOWS = 16
TOLERANCE = 1e-5

TURNS = {"federation": {"mode": "sequential", "average_every": 2}}
PAIRS = {"federation": {"mode": "synchronous", "participants": 2}}
SAMPLED = {
    "sequential": TURNS,
    "synchronous": PAIRS,
    "parallel": {"federation": {"mode": "parallel", "average_every": 2, "participants": 2}},
    "parallel-int8": {
        "federation": {"mode": "parallel", "average_every": 2, "participants": 2, "average_scope": "embeddings"},
        "wire": {"updates": "int8"},
    },
}
CENTRALIZED = {
    "stage2-fixed-sgd": (2, "fixed", {"name": "sgd", "lr": 0.5}),
    "stage3-arrival-adamw": (3, "arrival", {"name": "adamw", "lr": 0.01, "gradient_clipping": 0.1}),
}


def tree_of(folder: Path, name: str, stage: int, order: str = "fixed", **sections: Any) -> dict[str, Any]:
    tree = run_file(
        folder, name, window={"order": order}, body={"deepspeed": str(ZERO / f"zero{stage}.json")},
        **{"clients": {"expected": len(CLIENTS)}, **sections},
    )  # fmt: skip
    tree["run"]["windows"] = WINDOWS
    return tree


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Every run of this file, in the same six processes."""
    folder = tmp_path_factory.mktemp("participation")
    data = write_text(folder, CLIENTS)
    jobs: list[dict[str, Any]] = []

    def add(tree: dict[str, Any], resume: bool = False, mutation: str | None = None, forget: bool = False) -> None:
        jobs.append({"config": tree, "resume": resume, "data": data, "mutation": mutation, "forget": forget})

    for name, sections in SAMPLED.items():
        add(tree_of(folder, f"{name}-whole", 0, **sections))
        add(tree_of(folder, f"{name}-resumed", 0, **sections), mutation="stopped before window 3")
        add(tree_of(folder, f"{name}-resumed", 0, **sections), resume=True, forget=name == "synchronous")
    for name, (stage, order, optimizer) in CENTRALIZED.items():
        add(tree_of(folder, name, stage, order, **PAIRS, optimizer=optimizer))
    run_jobs(folder, jobs)
    return folder, data


@pytest.fixture(scope="module")
def oracle(runs: tuple[Path, dict[str, str]]) -> OneAfterAnother:
    folder, data = runs
    torch.set_num_threads(1)
    training = OneAfterAnother(tree_of(folder, "oracle", 0, **TURNS), data)
    training.train()
    training.save(folder / "oracle" / "hf")
    return training


def test_sequential_equals_one_client_after_another_to_the_bit(
    runs: tuple[Path, dict[str, str]], oracle: OneAfterAnother
) -> None:
    folder, _ = runs
    assert [row["loss"] for row in _metrics(folder / "sequential-whole")] == oracle.losses
    _assert_bit_identical(_weights(folder / "sequential-whole"), _weights(folder / "oracle"))


def test_moments_stay_with_their_client_and_weights_go_on(
    runs: tuple[Path, dict[str, str]], oracle: OneAfterAnother
) -> None:
    folder, _ = runs
    steps = set()
    for client in CLIENTS:
        state = load_state(folder / "sequential-whole" / "clients" / client, WINDOWS)
        own = oracle.optimizers[client].state()
        assert state["optimizer"].keys() == own.keys()
        for name, values in own.items():
            for key, value in values.items():
                assert torch.equal(torch.as_tensor(state["optimizer"][name][key]), torch.as_tensor(value)), (name, key)
            steps.add(float(values["step"]))
        reference = dict(oracle.halves[client].named_parameters())
        assert all(torch.equal(state["half"][name], parameter) for name, parameter in reference.items())
    assert steps == {WINDOWS / len(CLIENTS)}, "each steps in its own windows alone"


@pytest.mark.parametrize("name", CENTRALIZED)
def test_two_of_four_equal_centralized_training_on_what_they_bring(runs: tuple[Path, dict[str, str]], name) -> None:
    folder, data = runs
    stage, order, optimizer = CENTRALIZED[name]
    training = Centralized(tree_of(folder, "centralized", stage, order, **PAIRS, optimizer=optimizer), data)
    expected, trained = training.train(), _weights(folder / name)
    assert trained.keys() == expected.keys()
    differences = {key: (trained[key] - expected[key]).abs().max().item() for key in expected}
    # The attention key's bias has a true gradient of zero: Adam divides rounding by rounding there.
    noise = [differences.pop(key) for key in list(differences) if key.endswith("key.bias")]
    assert max(differences.values()) <= TOLERANCE, max(differences.items(), key=lambda item: item[1])
    assert max(noise) <= (TOLERANCE if optimizer["name"] == "sgd" else 1e-3)
    everybody = tree_of(folder, "centralized", stage, order, optimizer=optimizer)
    other = Centralized(everybody, data).train()
    assert max((other[key] - expected[key]).abs().max().item() for key in expected) > 100 * TOLERANCE


def test_windows_hold_their_tokens_on_average(runs: tuple[Path, dict[str, str]]) -> None:
    folder, _ = runs
    for name in SAMPLED:
        rows = _metrics(folder / f"{name}-whole")
        assert len(rows) == WINDOWS and all(row["masked_tokens"] for row in rows)
        mean = sum(row["tokens"] for row in rows) / WINDOWS
        # Sequences are not cut, so a share is not quite filled; and 16 windows are few.
        assert 0.75 * 700 < mean < 1.25 * 700, (name, mean)


def test_a_rank_without_participants_keeps_step(runs: tuple[Path, dict[str, str]]) -> None:
    """Two ranks and one client a turn: one of them has dummies alone."""
    folder, _ = runs
    for row in _metrics(folder / "sequential-whole"):
        assert 2 * row["dummy_micro_batches"] == row["forwards"] > 0


@pytest.mark.parametrize("name", SAMPLED)
def test_a_run_resumed_in_the_middle_equals_the_whole_one_to_the_bit(runs: tuple[Path, dict[str, str]], name) -> None:
    """Window 3 is the second of a turn or round of two windows."""
    folder, _ = runs
    whole, resumed = folder / f"{name}-whole", folder / f"{name}-resumed"
    assert [row["loss"] for row in _metrics(whole)] == [row["loss"] for row in _metrics(resumed)]
    _assert_bit_identical(_weights(whole), _weights(resumed))
    tree = tree_of(folder, name, 0, **SAMPLED[name])
    config = parse_config(tree, "test")
    keeps_states = strategy_of_run(config).halves_are_personal
    for client in CLIENTS:
        folders = [run / "clients" / client for run in (whole, resumed)]
        assert [bool(saved_windows(own)) for own in folders] == [keeps_states] * 2
        if keeps_states:
            mine, later = (load_state(own, WINDOWS) for own in folders)
            assert str(mine["optimizer"]) == str(later["optimizer"])
            _assert_bit_identical(mine["half"], later["half"])


def _weights(run: Path) -> dict[str, Tensor]:
    return AutoModelForMaskedLM.from_pretrained(run / "hf").state_dict()


def _metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _assert_bit_identical(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
