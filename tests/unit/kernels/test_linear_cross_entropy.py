"""Linear + cross-entropy: loss and gradients over chunks, extremes, operator, memory, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from unit.kernels.bounds import (  # noqa: F401
    DEVICE,
    DTYPES,
    assert_as_good_as_torch,
    bodies_of,
    needs_triton,
    on_device,
    values_and_gradients,
)

from fedbert_kernels import linear_cross_entropy as module
from fedbert_kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

body = bodies_of(module)
operators = torch.ops.fedbert_kernels


def _draw(
    num_rows: int, hidden: int, vocabulary: int, dtype=torch.float32, seed: int = 0
) -> tuple[list[Tensor], Tensor]:
    """hidden states, weight, bias; and targets, every fifth ignored."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    parts = [
        torch.randn(*shape, generator=generator) for shape in ((num_rows, hidden), (vocabulary, hidden), (vocabulary,))
    ]
    targets = torch.randint(vocabulary, (num_rows,), generator=generator)
    targets[4::5] = -100
    return [part.to(dtype) for part in parts], targets


def _with(compute, targets: Tensor, **options: Any):
    return lambda hidden, weight, bias: compute(hidden, weight, bias, targets, **options)


def _torchs(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    return linear_cross_entropy_reference(hidden, weight, bias, targets)


@settings(max_examples=20, derandomize=True)
@given(
    num_rows=st.one_of(st.sampled_from([0, 1]), st.integers(1, 12)),
    hidden=st.integers(8, 40),
    vocabulary=st.one_of(st.sampled_from([1, 64, 65, 4097]), st.integers(2, 300)),
    chunk_rows=st.integers(1, 13),
    dtype=st.sampled_from(DTYPES),
    has_bias=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_kernel_is_as_good_as_torch(
    num_rows: int, hidden: int, vocabulary: int, chunk_rows: int, dtype, has_bias: bool, seed: int
) -> None:
    (states, weight, bias), targets = _draw(num_rows, hidden, vocabulary, dtype, seed)
    parts = (states, weight, bias if has_bias else None)
    terms = max(float(part.abs().max()) for part in (states, weight, bias) if part.numel())
    assert_as_good_as_torch(
        _with(linear_cross_entropy, targets, chunk_rows=chunk_rows),
        _with(_torchs, targets),
        parts,
        torch.tensor(1.0),
        terms,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_either_body_is_as_good_as_torch_and_scales_its_gradients(body, dtype) -> None:
    parts, targets = _draw(20, 24, 130, dtype)
    ours = _with(linear_cross_entropy, targets, chunk_rows=7)
    assert_as_good_as_torch(ours, _with(_torchs, targets), parts, torch.tensor(0.125))


def test_the_size_of_chunks_does_not_matter(body) -> None:
    parts, targets = _draw(20, 16, 70)
    results = [
        values_and_gradients(_with(linear_cross_entropy, targets, chunk_rows=rows), parts, torch.tensor(1.0))
        for rows in (1, 6, 20, None)
    ]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def test_ignored_rows_count_nothing(body) -> None:
    (hidden, weight, bias), targets = _draw(20, 16, 70)
    kept = targets != -100
    whole = values_and_gradients(_with(linear_cross_entropy, targets), (hidden, weight, bias), torch.tensor(1.0))
    only = values_and_gradients(
        _with(linear_cross_entropy, targets[kept]), (hidden[kept], weight, bias), torch.tensor(1.0)
    )
    torch.testing.assert_close((whole[0], *whole[2:]), (only[0], *only[2:]))
    assert whole[1][~kept].abs().max() == 0
    targets[:] = 7
    assert float(linear_cross_entropy(hidden, weight, bias, targets, ignore_index=7)) == 0.0


def test_extreme_scores_stay_finite(body) -> None:
    hidden, weight = torch.tensor([[1000.0], [-1000.0]]), torch.tensor([[1.0], [0.0], [-1.0]])
    loss, dhidden, _ = values_and_gradients(
        lambda hidden, weight: linear_cross_entropy(hidden, weight, None, torch.tensor([0, 0])),
        (hidden, weight),
        torch.tensor(1.0),
    )
    assert float(loss) == 2000.0
    assert dhidden.tolist() == [[0.0], [-2.0]]


def test_without_gradients_none_are_made(body) -> None:
    parts, targets = _draw(10, 8, 33)
    expected = linear_cross_entropy_reference(*parts, targets)

    def products(*parts: Tensor) -> int:
        """Matrix products of a call."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            torch.testing.assert_close(linear_cross_entropy(*parts, targets), expected)
        return sum(event.name in ("aten::mm", "aten::addmm_") for event in profile.events())

    assert products(*parts) == 1, "the scores"
    leaves = [part.requires_grad_() for part in parts]
    with torch.no_grad():
        assert products(*leaves) == 1
    assert products(*leaves) == 3, "and the gradients of hidden states and weight"


def test_only_one_chunk_of_scores_is_held(body, monkeypatch) -> None:
    """No tensor made on the way is as large as [rows, vocabulary]."""
    parts, targets = _draw(60, 4, 1000)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            nonlocal largest
            result = function(*arguments, **options or {})
            for made in result if isinstance(result, tuple) else (result,):
                if isinstance(made, Tensor):
                    largest = max(largest, made.nbytes)
            return result

    with Watch():
        module.sum_over_chunks(*parts, targets, -100, True, 10)
    assert largest == 10 * 1024 * 4


def test_the_operator_obeys_the_rules_of_torch_library(body) -> None:
    (hidden, weight, bias), targets = _draw(6, 8, 20)
    leaves = [part.requires_grad_() for part in (hidden, weight, bias)]
    torch.library.opcheck(operators.linear_cross_entropy.default, (*leaves, targets, -100, True, 4))
    values = [leaf.detach() for leaf in leaves]
    torch.library.opcheck(operators.linear_cross_entropy.default, (*values, targets, -100, False, 4))
    torch.library.opcheck(operators.linear_cross_entropy_backward.default, (torch.tensor(2.0), *values))


@pytest.mark.skipif(DEVICE != "cpu", reason="looking at a GPU's targets is what the operator avoids")
def test_a_target_outside_the_vocabulary_is_refused_where_looking_is_free(body) -> None:
    (hidden, weight, bias), targets = _draw(6, 8, 20)
    for wrong in (20, -1):
        targets[2] = wrong
        with pytest.raises(ValueError, match="outside the vocabulary of 20"):
            linear_cross_entropy(hidden, weight, bias, targets)


@needs_triton
@pytest.mark.parametrize("wrong", [-1, 20, 64, 10**6])
def test_a_kernel_given_such_a_target_stays_in_bounds_and_says_so(wrong: int) -> None:
    scores, bias = torch.zeros(1, 64), torch.full((64,), -torch.inf)
    bias[:20] = 0.0
    losses = module.launch_cross_entropy(scores, bias, torch.tensor([wrong]), -100, True)
    assert not torch.isfinite(losses).any()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden": torch.zeros(2, 5)}, r"must be \[m, D\] and \[V, D\]"),
        ({"hidden": torch.zeros(2, 4, 1)}, r"must be \[m, D\] and \[V, D\]"),
        ({"weight": torch.zeros(0, 4)}, r"must be \[m, D\] and \[V, D\]"),
        ({"hidden": torch.zeros(2, 4, dtype=torch.float16)}, "hidden in torch.float16, weight in torch.float32"),
        ({"hidden": torch.zeros(2, 4).double(), "weight": torch.zeros(3, 4).double()}, "both fp32, fp16 or bf16"),
        ({"weight": torch.zeros(3, 4, device="meta")}, "different devices: cpu, meta"),
        ({"bias": torch.zeros(4)}, "does not fit"),
        ({"bias": torch.zeros(3, dtype=torch.float16)}, "does not fit"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, "targets must be"),
        ({"targets": torch.zeros(2, dtype=torch.int32)}, "targets must be"),
        ({"targets": torch.zeros(2, dtype=torch.int64, device="meta")}, "different devices: cpu, meta"),
        ({"chunk_rows": 0}, "at least one row"),
    ],
)
def test_bad_input_is_refused(changed: dict[str, Any], message: str) -> None:
    with torch.device("cpu"):
        arguments: dict[str, Any] = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(3, 4), "bias": torch.zeros(3)}
        arguments["targets"] = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments | changed)


@pytest.mark.skipif(DEVICE != "cpu", reason="counts allocations of the CPU")
def test_scores_of_all_rows_are_never_held(monkeypatch) -> None:
    num_rows, vocabulary = 1200, 20_000
    monkeypatch.setattr(module, "runs_triton", lambda _: False)
    hidden, weight = (torch.randn(size, 8, requires_grad=True) for size in (num_rows, vocabulary))
    targets = torch.arange(num_rows)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        linear_cross_entropy(hidden, weight, None, targets).backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 15 << 20 < largest < 17 << 20, "a chunk"
    assert largest < 4 * num_rows * vocabulary / 5
