"""LayerNorm, GELU, the loss and the codecs: ours and torch's own are right."""

import pytest
import torch

from fedbert_ds.bench.kernels.problem import BOTH, FORWARD, OURS
from fedbert_ds.bench.kernels.rows import codec_problems, gelu_problem, layer_norm_problem, loss_problem
from fedbert_kernels.quantize import CODECS

CPU = torch.device("cpu")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_layer_norm(outcomes, dropout: float) -> None:
    found = outcomes(layer_norm_problem(16, 48, torch.float32, dropout, CPU, compiled=False))
    assert {found[name, what] for name in (OURS, "torch") for what in (FORWARD, BOTH)} == {None}


def test_gelu_and_loss(outcomes) -> None:
    for problem in (
        gelu_problem(8, 40, torch.float32, CPU, compiled=False),
        loss_problem(10, 16, 70, torch.float32, CPU, compiled=False),
    ):
        found = outcomes(problem)
        assert {found[name, what] for name in (OURS, "torch") for what in (FORWARD, BOTH)} == {None}


@pytest.mark.parametrize("codec", list(CODECS))
def test_codecs(outcomes, codec: str) -> None:
    for problem in codec_problems(codec, 6, 128, torch.float32, CPU, compiled=False):
        found = outcomes(problem)
        assert found[OURS, FORWARD] is None and found["torch", FORWARD] is None
        assert set(problem.work) == {FORWARD}


def test_bytes_are_those_that_must_move() -> None:
    tensor = 16 * 48 * 4
    norm = layer_norm_problem(16, 48, torch.float32, 0.1, CPU)
    assert norm.work == {FORWARD: 3 * tensor, BOTH: 8 * tensor}
    assert layer_norm_problem(16, 48, torch.float32, 0.0, CPU).work[BOTH] == 7 * tensor
    assert gelu_problem(16, 48, torch.float32, CPU).work == {FORWARD: 2 * tensor, BOTH: 5 * tensor}
    quantized, _ = codec_problems("int8", 16, 48, torch.float32, CPU)
    assert quantized.work[FORWARD] == tensor + 16 * 48 + 16 * 4
