"""Bias + GELU: values and gradients against fp64, extremes, repeatability, the operator, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.kernels.bounds import (  # noqa: F401
    DEVICE,
    DTYPES,
    assert_as_good_as_torch,
    bodies_of,
    needs_triton,
    on_device,
    values_and_gradients,
)

from fedbert_kernels import gelu
from fedbert_kernels.gelu import bias_gelu, bias_gelu_reference

body = bodies_of(gelu)


@settings(max_examples=20, derandomize=True)
@given(
    num_rows=st.one_of(st.sampled_from([0, 1, 33]), st.integers(1, 80)),
    width=st.one_of(st.sampled_from([1, 1023, 1025]), st.integers(1, 200)),
    dtype=st.sampled_from(DTYPES),
    has_bias=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_kernel_is_as_good_as_torch(num_rows: int, width: int, dtype, has_bias: bool, seed: int) -> None:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    x, dy = (torch.randn(num_rows, width, generator=generator).mul(3).to(dtype) for _ in range(2))
    bias = torch.randn(width, generator=generator).to(dtype) if has_bias else None
    assert_as_good_as_torch(bias_gelu, bias_gelu_reference, (x, bias), dy)


@pytest.mark.parametrize("dtype", DTYPES)
def test_either_body_is_as_good_as_torch(body, dtype) -> None:
    torch.manual_seed(0)
    x, bias, dy = torch.randn(3, 5, 96).to(dtype), torch.randn(96).to(dtype), torch.randn(3, 5, 96).to(dtype)
    assert_as_good_as_torch(bias_gelu, bias_gelu_reference, (x, bias), dy)


@pytest.mark.parametrize("dtype", DTYPES)
def test_far_from_zero_it_is_zero_or_the_identity(body, dtype) -> None:
    x = torch.tensor([[-1e4, -60.0, -20.0, 0.0, 20.0, 60.0, 1e4]], dtype=dtype)
    y, dx = values_and_gradients(bias_gelu, (x,), torch.ones_like(x))
    assert y[0, 3:].equal(x[0, 3:])
    assert y[0, :3].abs().max().double() < 1e-30
    assert dx.equal(torch.tensor([[0, 0, 0, 0.5, 1, 1, 1]], dtype=dtype))


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_tail_keeps_its_relative_precision(dtype) -> None:
    # One plus erf(x) in fp32 has lost a fifth of the value at -5.
    x = torch.linspace(-4.0, -2.0, 64).to(dtype)[None]
    exact = bias_gelu_reference(x, upcast=True)
    assert ((bias_gelu(x).double() - exact) / exact).abs().max() < 1.1 * torch.finfo(dtype).eps


def test_two_runs_give_the_same_bits(body) -> None:
    torch.manual_seed(1)
    parts, dy = (torch.randn(300, 40), torch.randn(40)), torch.randn(300, 40)
    first, second = (values_and_gradients(bias_gelu, parts, dy) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_a_bias_in_fp32_keeps_its_dtype(body) -> None:
    x, bias = torch.randn(4, 8, dtype=torch.bfloat16), torch.randn(8)
    y, dx, dbias = values_and_gradients(bias_gelu, (x, bias), torch.ones(4, 8))
    assert (y.dtype, dx.dtype, dbias.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


def test_an_input_need_not_be_contiguous(body) -> None:
    x, bias = torch.randn(8, 6).T, torch.randn(8)
    assert torch.equal(bias_gelu(x, bias), bias_gelu(x.contiguous(), bias))


def test_the_operator_obeys_the_rules_of_torch_library(body) -> None:
    x, bias = torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    torch.library.opcheck(torch.ops.fedbert_kernels.bias_gelu.default, (x, bias))
    torch.library.opcheck(torch.ops.fedbert_kernels.bias_gelu_backward.default, (x.detach(), x.detach(), None))


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.zeros(2, 4, dtype=torch.float64), None, "fp32, fp16 or bf16"),
        (torch.zeros(()), None, "must be"),
        (torch.zeros(2, 4), torch.zeros(3), r"bias is \[3\]"),
        (torch.zeros(2, 4), torch.zeros(4, dtype=torch.bfloat16), "x's dtype or fp32"),
        (torch.zeros(2, 4), torch.zeros(4, device="meta"), "bias on meta"),
    ],
)
def test_bad_input_is_refused(x, bias, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bias_gelu(x, bias)
