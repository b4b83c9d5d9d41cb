"""Under DeepSpeed at ZeRO stages 2 and 3, a body with fused kernels trains as one in torch."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from unit.kernels.bounds import needs_triton

pytestmark = [pytest.mark.timeout(300), needs_triton]

WORKER = Path(__file__).with_name("kernel_worker.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folder that two ranks wrote."""
    folder = tmp_path_factory.mktemp("kernels")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    # Interpreted kernels run on the CPU, so hide any GPU.
    common = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(WORKER), str(folder)]
    with (folder / "log").open("w") as log:
        ranks = subprocess.Popen(command, env=os.environ | common, stdout=log, stderr=log, start_new_session=True)
    try:
        assert ranks.wait(timeout=280) == 0, (folder / "log").read_text()[-3000:]
    finally:
        # Kill both: one may have left the other waiting.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(ranks.pid, signal.SIGKILL)
        ranks.wait()
    return folder


@pytest.mark.parametrize("rank", range(2))
@pytest.mark.parametrize("stage", [2, 3])
def test_modernbert_s_weights_and_input_gradients_are_the_same(folder, stage: int, rank: int) -> None:
    """Attention alone is fused, with windows in the second layer."""
    plain, fused = (
        torch.load(folder / f"modernbert-{stage}-{kernels}-{rank}.pt", weights_only=True)
        for kernels in ("torch", "triton")
    )
    torch.testing.assert_close(fused, plain, atol=1e-4, rtol=1e-4)
    assert any(not torch.equal(fused[name], plain[name]) for name in plain)


@pytest.mark.parametrize("rank", range(2))
@pytest.mark.parametrize(("stage", "kernels"), [(2, "triton"), (2, "compiled"), (3, "triton")])
def test_weights_and_input_gradients_are_the_same(folder, stage: int, kernels: str, rank: int) -> None:
    plain, fused, first = (
        torch.load(folder / f"{name}-{rank}.pt", weights_only=True)
        for name in (f"{stage}-torch", f"{stage}-{kernels}", "2-torch")
    )
    torch.testing.assert_close(fused, plain, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(plain, first, atol=1e-4, rtol=1e-4)
    # The same mathematics in another order: equality to the last bit would mean no kernel ran.
    assert any(not torch.equal(fused[name], plain[name]) for name in plain)
