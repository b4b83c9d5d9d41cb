"""With several GPUs, every kernel is launched on its tensors' device, not on the current one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from unit.kernels.bounds import needs_triton

from fedbert_kernels import attention as attention_module
from fedbert_kernels.attention import attention
from fedbert_kernels.gelu import bias_gelu
from fedbert_kernels.interpreter import INTERPRETED
from fedbert_kernels.layer_norm import residual_layer_norm
from fedbert_kernels.linear_cross_entropy import linear_cross_entropy
from fedbert_kernels.quantize import dequantize, quantize

CU_SEQLENS = torch.tensor([0, 3, 8], dtype=torch.int32)
SEED = torch.tensor([1, 0])


def _there_and_back(x: Tensor) -> Tensor:
    return dequantize(*quantize(x.detach(), "int8"), "int8", x.shape[-1]) + 0.0 * x


OPERATORS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...], int]] = {
    "attention": (lambda x: attention(x, CU_SEQLENS, dropout=0.1, seed=SEED), (8, 3, 2, 16), 3),
    "gelu": (lambda x: bias_gelu(x, torch.ones(16)), (8, 16), 2),
    "layer norm": (
        lambda x: residual_layer_norm(x, x, torch.ones(16), torch.ones(16), torch.ones(16), 0.1, seed=SEED),
        (8, 16), 2,
    ),
    "linear + cross-entropy": (
        lambda x: linear_cross_entropy(x, torch.ones(5, 16), torch.zeros(5), torch.zeros(8, dtype=torch.int64)),
        (8, 16), 1,
    ),
    "codecs": (_there_and_back, (8, 16), 2),
}  # fmt: skip
"""What computes, the shape it takes, and how many kernels forward and backward launch together."""


@pytest.mark.skipif(torch.cuda.is_available() or not INTERPRETED, reason="looks into Triton's interpreter")
@needs_triton
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_kernel_is_launched_where_its_tensors_are(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import GridExecutor

    current: list[torch.device] = [torch.device("meta")]
    launched: list[torch.device] = []

    @contextmanager
    def device_of(tensor: Tensor):
        current.append(tensor.device)
        yield
        current.pop()

    launch = GridExecutor.__call__

    def watched(self, *arguments: object, **options: object) -> None:
        launched.append(current[-1])
        launch(self, *arguments, **options)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(GridExecutor, "__call__", watched)
    # On a CPU attention has a body in torch; here it gives way to the kernels.
    monkeypatch.setattr(attention_module.attention_torch, "forward", attention_module.launch_forward)
    monkeypatch.setattr(attention_module.attention_torch, "backward", attention_module.launch_backward)
    compute, shape, num_kernels = OPERATORS[operator]
    x = torch.randn(shape, requires_grad=True)
    compute(x).sum().backward()
    assert launched == [torch.device("cpu")] * num_kernels
    assert current == [torch.device("meta")]
