"""The engine under DeepSpeed: what it tells the kernels, windows undone, results computed again."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from unit.kernels.bounds import needs_triton

from fedbert_ds.run_file import parse_config
from fedbert_ds.server.body import engine
from fedbert_ds.server.body.engine import BodyEngine


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("stage", [2, 3])
def test_kernels_are_chosen_for_what_deepspeed_will_make_of_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, dtype: torch.dtype, stage: int
) -> None:
    class Installed(Exception):
        """Far enough."""

    def install_kernels(body: Any, kernels: str, device: torch.device, **choices: Any) -> None:
        assert choices == {"dtype": dtype, "longest": 77}
        raise Installed

    monkeypatch.setattr(engine, "install_kernels", install_kernels)
    (tmp_path / "mine.json").write_text("{}")
    body = {"deepspeed": str(tmp_path / "mine.json"), "precision": precision, "zero_stage": stage}
    config = parse_config({"body": body}, "test")

    class Unsplit(torch.nn.Linear):
        """Nothing that could be computed again."""

        def recompute(self, what: str) -> None:
            assert what == "none"

    with pytest.raises(Installed):
        BodyEngine.build(Unsplit(2, 2), config.body, config.optimizer, config.kernels, torch.device("cpu"), 77)


@pytest.fixture(scope="module")
def undone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of runs in which windows were undone, and of the same runs without these."""
    return two_ranks("drop_worker.py", tmp_path_factory.mktemp("undone"))


@pytest.fixture(scope="module")
def recomputed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights and input gradients of runs that keep all, and of those that compute it again."""
    return two_ranks("recompute_worker.py", tmp_path_factory.mktemp("recomputed"))


def two_ranks(worker: str, folder: Path) -> Path:
    """The folder, after two ranks of the worker have written into it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name(worker)), str(folder)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=570)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return folder


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_window_that_is_undone_leaves_nothing_in_the_body(undone: Path, stage: int, precision: str) -> None:
    """Three windows, with others undone in between, equal the three alone bit by bit: weights,
    moments and what accumulates."""
    for rank in range(2):
        plain, dropped = (
            torch.load(undone / f"{stage}-{precision}-{kind}-{rank}.pt", weights_only=True)
            for kind in ("plain", "dropped")
        )
        assert plain.keys() == dropped.keys() and plain
        for name, tensor in plain.items():
            assert torch.equal(tensor, dropped[name]), name


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_sequence_that_spoils_a_micro_batch_is_left_out_and_the_others_count_to_the_bit(
    undone: Path, stage: int
) -> None:
    spoilt, zeros = (
        torch.load(undone / f"{stage}-fp32-{kind}-0.pt", weights_only=True) for kind in ("spoilt", "zeros")
    )
    assert spoilt.keys() == zeros.keys() and spoilt
    for name, tensor in zeros.items():
        assert torch.isfinite(tensor).all() and torch.equal(tensor, spoilt[name]), name


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_rank_alone_leaves_a_sequence_out_of_one_micro_batch(undone: Path, stage: int) -> None:
    """At stage 3 both forward again in the step, where it counts last: its part of the sum is
    rounded elsewhere.
    """
    some, zeros = (torch.load(undone / f"{stage}-fp32-{kind}-0.pt", weights_only=True) for kind in ("some", "zeros"))
    for name, tensor in zeros.items():
        assert torch.allclose(some[name], tensor, rtol=0.0, atol=1e-6 if stage == 3 else 0.0), name


@pytest.mark.timeout(570)
@pytest.mark.parametrize(
    ("kernels", "what"),
    [
        ("torch", "elementwise"),
        ("torch", "attention"),
        ("torch", "layers"),
        pytest.param("fused", "elementwise", marks=needs_triton),
        pytest.param("fused", "attention", marks=needs_triton),
    ],
)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_is_computed_again_has_the_same_bits(recomputed: Path, stage: int, kernels: str, what: str) -> None:
    """With dropout, bf16 and micro-batches in flight together."""
    for rank in range(2):
        kept, again = (
            torch.load(recomputed / f"{stage}-{kernels}-{kind}-{rank}.pt", weights_only=True) for kind in ("none", what)
        )
        assert kept.keys() == again.keys() and any(name.startswith("input 1") for name in kept)
        for name, tensor in kept.items():
            assert torch.equal(tensor, again[name]), name
        assert any(torch.any(tensor != 0) for name, tensor in kept.items() if name.startswith("input"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `compile_worker.py` found."""
    folder = tmp_path_factory.mktemp("compiled")
    worker = Path(__file__).with_name("compile_worker.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, str(worker), str(folder)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=570)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return torch.load(folder / "found.pt", weights_only=True)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("what", ["gradients", "weights"])
def test_a_run_with_compiled_layers_is_the_run_without(compiled: dict[str, Any], what: str) -> None:
    """To rounding, over windows of other token, sequence and masked counts and a dummy."""
    torch.testing.assert_close(compiled[f"{what} compiled"], compiled[f"{what} plain"], atol=1e-5, rtol=1e-4)


@pytest.mark.timeout(600)
def test_a_run_with_compiled_layers_compiles_before_its_first_micro_batch_alone(compiled: dict[str, Any]) -> None:
    assert compiled["compiled before"] > 0
    assert compiled["recompiles compiled"] == compiled["recompiles plain"] == [0, 0, 0]
    # The count can tell.
    assert compiled["recompiles of a layer in fp64"] > 0
