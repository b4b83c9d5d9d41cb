"""Attention: on a CPU every baseline that runs there is right, and the others say why not."""

import pytest
import torch

from fedbert_ds.bench.kernels import attention as attention_baselines
from fedbert_ds.bench.kernels.attention import Packed, attention_problem, draw_lengths
from fedbert_ds.bench.kernels.problem import BOTH, FORWARD, OURS

CPU = torch.device("cpu")
GPU_ONLY = {"FlashAttention-2 in torch", "torch varlen_attn", "cuDNN, padded"}

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("lengths", [[5, 1, 40, 17, 30], [24] * 4])
def test_attention(outcomes, lengths: list[int], dropout: float, monkeypatch) -> None:
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
    out = attention_baselines.TorchFlash.apply(q, k, v, layout, 0.1)
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
