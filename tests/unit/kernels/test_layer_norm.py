"""Residual + dropout + bias + LayerNorm: values, gradients, masks, the operator, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from unit.kernels.bounds import (  # noqa: F401
    DEVICE,
    DTYPES,
    assert_as_good_as_torch,
    bodies_of,
    needs_triton,
    on_device,
    values_and_gradients,
)

from fedbert_kernels import layer_norm, row_philox
from fedbert_kernels.layer_norm import keep_mask_reference, residual_layer_norm, residual_layer_norm_reference

SEED = torch.tensor([0x123456789ABCDEF, 42], device=DEVICE)


body = bodies_of(layer_norm)


def _draw(num_rows: int, width: int, dtype=torch.float32, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """x, residual, bias, weight, shift; and an incoming gradient."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    x, residual, dy = (torch.randn(num_rows, width, generator=generator).to(dtype) for _ in range(3))
    vectors = [torch.randn(width, generator=generator).to(dtype) for _ in range(3)]
    return [x, residual, *vectors], dy


def _with(compute, **options: Any):
    return lambda *parts: compute(*parts, **options)


@settings(max_examples=20, derandomize=True)
@given(
    num_rows=st.one_of(st.sampled_from([0, 1]), st.integers(1, 60)),
    width=st.one_of(st.sampled_from([255, 257, 768, 1025]), st.integers(8, 100)),
    dtype=st.sampled_from(DTYPES),
    dropout=st.sampled_from([0.0, 0.1, 0.5]),
    absent=st.sets(st.sampled_from([1, 2, 4])),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_kernel_is_as_good_as_torch(num_rows: int, width: int, dtype, dropout: float, absent, seed: int) -> None:
    parts, dy = _draw(num_rows, width, dtype, seed)
    given_parts = [None if number in absent else part for number, part in enumerate(parts)]
    options = {"dropout": dropout, "epsilon": 1e-5, "seed": SEED + seed}
    terms = float(dy.abs().max() * parts[3].abs().max()) if num_rows else 0.0
    assert_as_good_as_torch(
        _with(residual_layer_norm, **options), _with(residual_layer_norm_reference, **options), given_parts, dy, terms
    )


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_either_body_is_as_good_as_torch(body, dtype, dropout: float) -> None:
    parts, dy = _draw(40, 96, dtype)
    options = {"dropout": dropout, "seed": SEED}
    assert_as_good_as_torch(
        _with(residual_layer_norm, **options), _with(residual_layer_norm_reference, **options), parts, dy
    )


def test_the_widest_row_goes(body) -> None:
    parts, dy = _draw(2, layer_norm.LARGEST_WIDTH)
    options = {"dropout": 0.1, "seed": SEED}
    assert_as_good_as_torch(
        _with(residual_layer_norm, **options), _with(residual_layer_norm_reference, **options), parts, dy
    )


def test_a_row_of_one_column_is_its_shift(body) -> None:
    parts, dy = _draw(3, 1)
    y, dx, *_ = values_and_gradients(_with(residual_layer_norm, epsilon=1e-5), parts, dy)
    assert y.equal(parts[4].expand(3, 1))
    assert dx.abs().max() < 1e-4


def test_a_large_common_offset_does_not_drown_the_deviations(body) -> None:
    parts, dy = _draw(8, 256)
    parts[1] += 1000.0
    assert_as_good_as_torch(residual_layer_norm, residual_layer_norm_reference, parts, dy)


@needs_triton
def test_both_bodies_drop_the_same(monkeypatch) -> None:
    parts, dy = _draw(30, 100)
    compute = _with(residual_layer_norm, dropout=0.3, seed=SEED)
    by_kernel = values_and_gradients(compute, parts, dy)
    monkeypatch.setattr(layer_norm, "runs_triton", lambda _: False)
    by_torch = values_and_gradients(compute, parts, dy)
    for ours, theirs in zip(by_kernel, by_torch, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert ((by_kernel[1] == 0) == ~keep_mask_reference(SEED, 30, 100, 0.3)).all()


def test_forward_and_backward_drop_the_same(body) -> None:
    """What forward dropped has no gradient, and what it kept has one."""
    num_rows, width, dropout = 50, 120, 0.25
    x = torch.full((num_rows, width), 5.0)
    parts = (x, torch.zeros_like(x), None, torch.ones(width), None)
    compute = _with(residual_layer_norm, dropout=dropout, seed=SEED)
    y, dx, *_ = values_and_gradients(compute, parts, torch.randn(num_rows, width))
    # Of equal values, those kept are above the row's mean and those dropped below.
    assert ((y > 0) == (dx != 0)).all()


def test_dropout_keeps_the_expected_share_and_nothing_repeats() -> None:
    num_rows, width, dropout = 512, 768, 0.1
    keep = keep_mask_reference(SEED, num_rows, width, dropout).double()
    rate = 1 - row_philox.row_drop_threshold(dropout) / row_philox.LEVELS
    assert abs(rate - 0.9) < 1e-5
    deviation = (rate * (1 - rate) / keep.numel()) ** 0.5
    assert abs(float(keep.mean()) - rate) < 5 * deviation
    centered = keep - rate
    others = {
        "next column": centered.roll(1, 1),
        "next pair": centered.roll(2, 1),
        "next group": centered.roll(8, 1),
        "next row": centered.roll(1, 0),
        "next offset": keep_mask_reference(SEED + torch.tensor([0, 1]), num_rows, width, dropout).double() - rate,
        "next seed": keep_mask_reference(SEED + torch.tensor([1, 0]), num_rows, width, dropout).double() - rate,
    }
    for name, other in others.items():
        correlation = float((centered * other).mean()) / (rate * (1 - rate))
        assert abs(correlation) < 5 / keep.numel() ** 0.5, name


def test_random_numbers_are_uniform() -> None:
    numbers = row_philox.random_16_reference(SEED, 256, 512)
    counts = torch.bincount(numbers.flatten() >> 8, minlength=256).double()
    expected = numbers.numel() / 256
    # Chi squared with 255 degrees of freedom has deviation 22.6.
    assert abs(float(((counts - expected) ** 2 / expected).sum()) - 255) < 5 * 22.6
    low_bits = torch.bincount(numbers.flatten() & 255, minlength=256).double()
    assert abs(float(((low_bits - expected) ** 2 / expected).sum()) - 255) < 5 * 22.6


def test_two_runs_give_the_same_bits(body) -> None:
    parts, dy = _draw(700, 40)
    first, second = (
        values_and_gradients(_with(residual_layer_norm, dropout=0.1, seed=SEED), parts, dy) for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


def test_without_a_seed_each_call_draws_another_mask_from_torch(body) -> None:
    parts, _ = _draw(20, 64)
    torch.manual_seed(3)
    first, second = (residual_layer_norm(*parts, dropout=0.2) for _ in range(2))
    torch.manual_seed(3)
    again = residual_layer_norm(*parts, dropout=0.2)
    assert first.equal(again)
    assert not first.equal(second)


def test_activation_checkpointing_draws_the_same_mask_again(body) -> None:
    parts, dy = _draw(20, 64)

    def through_checkpoint(*leaves: Tensor) -> Tensor:
        return checkpoint(residual_layer_norm, *leaves, 0.2, use_reentrant=False)

    torch.manual_seed(4)
    plain = values_and_gradients(_with(residual_layer_norm, dropout=0.2), parts, dy)
    torch.manual_seed(4)
    recomputed = values_and_gradients(through_checkpoint, parts, dy)
    assert all(map(torch.equal, plain, recomputed))


def test_parameters_in_fp32_keep_their_dtype(body) -> None:
    parts, dy = _draw(4, 16)
    parts[0], parts[1] = parts[0].bfloat16(), parts[1].bfloat16()
    dtypes = [part.dtype for part in values_and_gradients(residual_layer_norm, parts, dy)]
    assert dtypes == [torch.bfloat16] * 3 + [torch.float32] * 3


def test_leading_dimensions_and_strides_do_not_matter(body) -> None:
    (x, residual, *vectors), _ = _draw(24, 16)
    y = residual_layer_norm(x.view(2, 12, 16), residual.view(2, 12, 16), *vectors)
    strided = residual_layer_norm(x.T.contiguous().T, residual.T.contiguous().T, *vectors)
    assert y.shape == (2, 12, 16)
    assert y.view(24, 16).equal(strided)


@pytest.mark.parametrize("threshold", [0, 6554])
def test_the_operator_obeys_the_rules_of_torch_library(body, threshold: int) -> None:
    (x, residual, bias, weight, shift), dy = _draw(5, 24)
    leaves = [part.requires_grad_() for part in (x, residual, bias, weight, shift)]
    operators = torch.ops.fedbert_kernels
    torch.library.opcheck(operators.residual_layer_norm.default, (*leaves, threshold, 1e-12, SEED))
    values = [leaf.detach() for leaf in leaves]
    statistics = operators.residual_layer_norm(*values, threshold, 1e-12, SEED)[1:]
    torch.library.opcheck(operators.residual_layer_norm_backward.default, (dy, *values, *statistics, threshold, SEED))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(2, 4, dtype=torch.float64)}, "fp32, fp16 or bf16"),
        ({"x": torch.zeros(2, layer_norm.LARGEST_WIDTH + 1)}, "from 1 to 8192"),
        ({"residual": torch.zeros(2, 5)}, "residual is"),
        ({"residual": torch.zeros(2, 4, dtype=torch.bfloat16)}, "residual is"),
        ({"bias": torch.zeros(5)}, "bias is"),
        ({"weight": torch.ones(4, dtype=torch.float16)}, "weight is"),
        ({"shift": torch.zeros(4, device="meta")}, "different devices: cpu, meta"),
        ({"seed": torch.zeros(2)}, "seed must be"),
        ({"seed": torch.zeros(3, dtype=torch.int64)}, "seed must be"),
        ({"dropout": 1.0}, "below 1"),
        ({"dropout": -0.1}, "at least 0"),
    ],
)
def test_bad_input_is_refused(changed: dict[str, Any], message: str) -> None:
    with torch.device("cpu"):
        arguments: dict[str, Any] = {"x": torch.zeros(2, 4), "residual": torch.zeros(2, 4)}
        arguments |= {"bias": torch.zeros(4), "weight": torch.ones(4), "shift": torch.zeros(4)}
    with pytest.raises(ValueError, match=message):
        residual_layer_norm(**arguments | changed)
