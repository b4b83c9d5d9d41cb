"""What bench kernels compares: on a CPU every rival that runs there is right, and the others say why not."""

import pytest
import torch

from fedbert_ds.bench.kernels import attention_baselines, row_baselines
from fedbert_ds.bench.kernels.attention_baselines import Packed, attention_problem, draw_lengths
from fedbert_ds.bench.kernels.baselines import BOTH, FORWARD, OURS, Problem, measure
from fedbert_ds.bench.kernels.row_baselines import codec_problems, gelu_problem, layer_norm_problem, loss_problem

CPU = torch.device("cpu")
GPU_ONLY = {"FlashAttention-2 in torch", "torch varlen_attn", "cuDNN, padded"}

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


def outcomes(problem: Problem) -> dict[tuple[str, str], str | None]:
    rows = measure(problem, CPU, peak=1e9, rounds=1, seconds=0.0)
    return {(row["rival"], row["pass"]): row.get("reason") for row in rows}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("lengths", [[5, 1, 40, 17, 30], [24] * 4])
def test_attention(lengths: list[int], dropout: float, monkeypatch) -> None:
    monkeypatch.setattr(attention_baselines, "PADDED_BATCH", 2)
    found = outcomes(attention_problem("x", lengths, 2, 32, torch.float32, dropout, CPU, compiled=False))
    for what in (FORWARD, BOTH):
        assert found[OURS, what] is None and found["SDPA, padded", what] is None
        assert "--quick" in found["torch.compile, padded", what]
        for name in GPU_ONLY:
            assert found[name, what] in ("needs a GPU", "has no dropout")
    assert (found["torch varlen_attn", FORWARD] == "has no dropout") == (dropout > 0)


def test_the_work_of_attention_is_that_of_real_tokens() -> None:
    problem = attention_problem("x", [3, 1], 2, 16, torch.float32, 0.0, CPU)
    assert problem.work[FORWARD] == 4 * 10 * 2 * 16
    assert problem.work[BOTH] == 3.5 * problem.work[FORWARD]


def test_padded_batches_hold_every_token_once() -> None:
    layout = Packed([3, 1, 2], CPU)
    places = list(layout.batches())
    assert [first for first, _ in places] == [0]
    assert places[0][1].tolist() == [[True] * 3, [True, False, False], [True, True, False]]
    assert layout.cu_seqlens.tolist() == [0, 3, 4, 6] and not layout.equal


def test_flash_attention_in_torch_is_called_as_its_schema_says() -> None:
    """On the meta device: shapes and arguments, no numbers."""
    device = torch.device("meta")
    layout = Packed([5, 3], device)
    q, k, v = (torch.empty(8, 2, 64, dtype=torch.bfloat16, device=device, requires_grad=True) for _ in range(3))
    out = attention_baselines._Flash.apply(q, k, v, layout, 0.1)
    gradients = torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
    assert out.shape == q.shape and [gradient.shape for gradient in gradients] == [q.shape] * 3


def test_varlen_attention_in_torch_is_called_as_its_signature_says() -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    layout = Packed([5, 3], torch.device("meta"))
    q, k, v = (torch.empty(8, 2, 64, dtype=torch.bfloat16, device="meta") for _ in range(3))
    assert varlen.varlen_attn(q, k, v, layout.cu_seqlens, layout.cu_seqlens, 5, 5).shape == q.shape


def test_drawn_lengths_fill_the_tokens_and_repeat() -> None:
    lengths = draw_lengths([7, 20, 33], 500)
    assert 500 - 33 < sum(lengths) <= 500 and set(lengths) == {7, 20, 33}
    assert draw_lengths([7, 20, 33], 500) == lengths


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_layer_norm(dropout: float) -> None:
    found = outcomes(layer_norm_problem(16, 48, torch.float32, dropout, CPU, compiled=False))
    assert {found[name, what] for name in (OURS, "torch") for what in (FORWARD, BOTH)} == {None}
    assert found["Liger, dropout in torch", FORWARD] in (None, "not installed")


def test_gelu_and_loss() -> None:
    for problem in (
        gelu_problem(8, 40, torch.float32, CPU, compiled=False),
        loss_problem(10, 16, 70, torch.float32, CPU, compiled=False),
    ):
        found = outcomes(problem)
        assert {found[name, what] for name in (OURS, "torch") for what in (FORWARD, BOTH)} == {None}


def test_the_client_s_loss_has_torch_s_own_operator_beside_it() -> None:
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("this torch has none")
    found = outcomes(loss_problem(10, 16, 70, torch.float32, CPU, compiled=False))
    assert found["torch linear_cross_entropy", BOTH] is None


@pytest.mark.parametrize("codec", list(row_baselines.CODECS))
def test_codecs(codec: str) -> None:
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
