"""LayerNorm and GELU by torch.compile: the references' values, one compilation, torch's seed."""

from __future__ import annotations

import shutil
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from unit.kernels.bounds import DEVICE, on_device, values_and_gradients  # noqa: F401

from fedbert_kernels import compiled_rows
from fedbert_kernels.compiled_rows import compiled_bias_gelu, compiled_residual_layer_norm
from fedbert_kernels.gelu import bias_gelu_reference
from fedbert_kernels.layer_norm import residual_layer_norm_reference

# torch.compile's own imports.
pytestmark = pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")

WIDTH = 12
EPSILON = 1e-12


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch):
    """Counts graphs that torch.compile captures, without machine code and its C++ compiler."""
    counter = CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    compiled_rows.compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    yield counter
    compiled_rows.compiled.cache_clear()


def draw(*sizes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.randn(size, generator=random, device="cpu").to(DEVICE, dtype) for size in sizes]


def norm_parts(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, residual; bias, weight, shift in fp32."""
    return [*draw(shape, shape, dtype=dtype), *draw(*[(shape[-1],)] * 3)]


def norm(*parts: Tensor, dropout: float = 0.0) -> Tensor:
    return compiled_residual_layer_norm(*parts, dropout, EPSILON)


@pytest.mark.parametrize("num_rows", [0, 1, 2, 7])
def test_the_references_values_and_gradients(graphs, num_rows: int) -> None:
    parts, (dy,) = norm_parts(num_rows, WIDTH), draw((num_rows, WIDTH))
    got = values_and_gradients(lambda x, residual, *others: norm(x[None], residual[None], *others)[0], parts, dy)
    expected = values_and_gradients(lambda *p: residual_layer_norm_reference(*p, epsilon=EPSILON), parts, dy)
    torch.testing.assert_close(got, expected)
    got = values_and_gradients(compiled_bias_gelu, [parts[0], parts[2]], dy)
    torch.testing.assert_close(got, values_and_gradients(bias_gelu_reference, [parts[0], parts[2]], dy))
    assert graphs.frame_count == (2 if num_rows > 1 else 0)


def test_one_compilation_serves_all_numbers_of_rows_in_training_and_one_in_evaluation(graphs) -> None:
    for num_rows in (5, 7, 0, 1, 33, 2):
        for dropout in (0.1, 0.0):
            norm(*norm_parts(num_rows, WIDTH), dropout=dropout)
    assert graphs.frame_count == 2


def test_parameters_in_fp32_leave_rows_in_their_dtype(graphs) -> None:
    parts = norm_parts(3, WIDTH, dtype=torch.bfloat16)
    y = norm(*parts)
    assert y.dtype == torch.bfloat16
    expected = residual_layer_norm_reference(*parts, epsilon=EPSILON).float()
    torch.testing.assert_close(y.float(), expected, rtol=0.02, atol=0.02)
    assert compiled_bias_gelu(parts[0], parts[2]).dtype == torch.bfloat16


def test_a_layer_norm_without_a_shift(graphs) -> None:
    x, residual, bias, weight, _ = norm_parts(3, WIDTH)
    expected = residual_layer_norm_reference(x, residual, bias, weight, None, epsilon=EPSILON)
    torch.testing.assert_close(compiled_residual_layer_norm(x, residual, bias, weight, None, 0.0, EPSILON), expected)


def dropped(recompute: bool) -> list[Tensor]:
    parts = [part.requires_grad_() for part in norm_parts(6, WIDTH)]
    torch.manual_seed(3)

    def compute(*parts: Tensor) -> Tensor:
        return norm(*parts, dropout=0.5)

    y = checkpoint(compute, *parts, use_reentrant=False) if recompute else compute(*parts)
    return [y, *torch.autograd.grad(y.square().sum(), parts)]


def test_dropout_follows_torch_s_seed_also_when_recomputed(graphs) -> None:
    first = dropped(False)
    for again in (dropped(False), dropped(True)):
        assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    parts = norm_parts(6, WIDTH)
    assert not torch.equal(first[0], norm(*parts)), "nothing was dropped"


def test_a_model_that_is_compiled_as_a_whole_has_it_in_its_own_graph(graphs) -> None:
    parts = norm_parts(3, WIDTH)
    whole = torch.compile(norm, fullgraph=True)
    torch.testing.assert_close(whole(*parts), residual_layer_norm_reference(*parts, epsilon=EPSILON))
    assert graphs.frame_count == 1


@pytest.mark.skipif(DEVICE == "cpu" and shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_by_the_compiler_itself() -> None:
    parts, (dy,) = norm_parts(9, WIDTH), draw((9, WIDTH))
    got = values_and_gradients(norm, parts, dy)
    expected = values_and_gradients(lambda *p: residual_layer_norm_reference(*p, epsilon=EPSILON), parts, dy)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    got = values_and_gradients(compiled_bias_gelu, [parts[0], parts[2]], dy)
    torch.testing.assert_close(got, values_and_gradients(bias_gelu_reference, [parts[0], parts[2]], dy))
