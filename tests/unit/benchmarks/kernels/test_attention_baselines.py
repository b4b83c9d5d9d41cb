"""On a CPU attention's further baselines say why they do not run; their calls fit torch's
signatures."""

import pytest
import torch

from benchmarks.kernels.attention_baselines import TorchFlash, attention_baselines
from fedbert_ds.bench.kernels.attention import Packed, attention_problem
from fedbert_ds.bench.kernels.problem import Unavailable

CPU = torch.device("cpu")
GPU_ONLY = {"FlashAttention-2 in torch", "torch varlen_attn", "cuDNN, padded"}

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_cannot_run_says_why(dropout: float) -> None:
    found = attention_baselines(attention_problem("x", [5, 1], 2, 32, torch.float32, dropout, CPU), compiled=False)
    assert set(found) > GPU_ONLY
    reasons = {}
    for name, build in found.items():
        with pytest.raises(Unavailable) as error:
            build(dropout)
        reasons[name] = str(error.value)
    assert all(reasons[name] in ("needs a GPU", "has no dropout") for name in GPU_ONLY)
    assert (reasons["torch varlen_attn"] == "has no dropout") == (dropout > 0)
    assert ("--quick" in reasons["FlexAttention"]) == (dropout == 0)


def test_flash_attention_in_torch_is_called_as_its_schema_says() -> None:
    """On the meta device: shapes and arguments, no numbers."""
    device = torch.device("meta")
    layout = Packed([5, 3], device)
    q, k, v = (torch.empty(8, 2, 64, dtype=torch.bfloat16, device=device, requires_grad=True) for _ in range(3))
    out = TorchFlash.apply(q, k, v, layout, 0.1)
    gradients = torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
    assert out.shape == q.shape and [gradient.shape for gradient in gradients] == [q.shape] * 3


def test_varlen_attention_in_torch_is_called_as_its_signature_says() -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    layout = Packed([5, 3], torch.device("meta"))
    q, k, v = (torch.empty(8, 2, 64, dtype=torch.bfloat16, device="meta") for _ in range(3))
    assert varlen.varlen_attn(q, k, v, layout.cu_seqlens, layout.cu_seqlens, 5, 5).shape == q.shape
