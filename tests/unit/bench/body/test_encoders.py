"""Every way to train the encoder learns the same from a window, and counts what it computes."""

from __future__ import annotations

import pytest
import torch
from unit.kernels.bounds import needs_triton

from fedbert_ds.bench.body.encoders import Shape, Step, Window, divided, packed_step, padded_step

CPU = torch.device("cpu")
SHAPE = Shape("tiny", layers=2, hidden_size=32, heads=2, longest=16)
LENGTHS = (5, 16, 3, 5, 1, 9, 12)


@pytest.fixture(scope="module")
def window() -> Window:
    return Window.draw(LENGTHS, SHAPE.hidden_size, CPU, torch.float32)


def encoder_weights(step: Step) -> dict[str, torch.Tensor]:
    return {name.rpartition("encoder.")[2]: weight.detach() for name, weight in step.module.named_parameters()}


@pytest.mark.parametrize("budget", [20, 1000])
def test_all_ways_take_the_same_step(window, budget: int) -> None:
    steps = {
        "packed": packed_step(SHAPE, window, budget, 0.0, "torch", CPU),
        "padded": padded_step(SHAPE, window, budget, 0.0, CPU),
        "by length": padded_step(SHAPE, window, budget, 0.0, CPU, by_length=True),
    }
    before = {name: weight.clone() for name, weight in encoder_weights(steps["padded"]).items()}
    for step in steps.values():
        step.run()
        step.run()
    expected = encoder_weights(steps["padded"])
    for step in steps.values():
        weights = encoder_weights(step)
        # The gradient of a key's bias is zero but for rounding, which Adam makes as large as any
        # other.
        compared = [name for name in expected if not name.endswith("key.bias")]
        torch.testing.assert_close(
            [weights[name] for name in compared], [expected[name] for name in compared], atol=2e-5, rtol=0
        )
    assert max((expected[name] - before[name]).abs().max().item() for name in expected) > 1e-4


@needs_triton
def test_kernels_take_the_same_step(window) -> None:
    plain, fused = (packed_step(SHAPE, window, 1000, 0.0, kernels, CPU) for kernels in ("torch", "triton"))
    for step in (plain, fused):
        step.run()
    expected, weights = encoder_weights(plain), encoder_weights(fused)
    compared = [name for name in expected if not name.endswith("key.bias")]
    torch.testing.assert_close(
        [weights[name] for name in compared], [expected[name] for name in compared], atol=2e-5, rtol=0
    )


def test_16_bit_weights_follow_fp32_masters(window) -> None:
    exact = padded_step(SHAPE, window, 1000, 0.0, CPU)
    narrow = padded_step(SHAPE, Window.draw(LENGTHS, 32, CPU, torch.bfloat16), 1000, 0.0, CPU)
    for _ in range(3):
        exact.run()
        narrow.run()
    for name, weight in encoder_weights(narrow).items():
        assert weight.dtype == torch.bfloat16
        torch.testing.assert_close(weight.float(), encoder_weights(exact)[name], atol=1e-3, rtol=0.02)


def test_divided_keep_to_their_budget() -> None:
    assert divided(LENGTHS, 20, padded=False) == [[0], [1, 2], [3, 4, 5], [6]]
    assert divided(LENGTHS, 20, padded=True) == [[0], [1], [2, 3, 4], [5], [6]]
    assert divided(LENGTHS, 20, padded=True, order=[4, 2, 0, 3, 5, 6, 1]) == [[4, 2, 0, 3], [5], [6], [1]]
    assert divided(LENGTHS, 1, padded=False) == [[index] for index in range(7)]


def test_padding_counts_as_computed_and_not_as_needed(window) -> None:
    packed = packed_step(SHAPE, window, 1000, 0.0, "torch", CPU)
    padded = padded_step(SHAPE, window, 1000, 0.0, CPU)
    by_length = padded_step(SHAPE, window, 20, 0.0, CPU, by_length=True)
    assert (packed.computed_tokens, padded.computed_tokens) == (51, 7 * 16)
    assert by_length.computed_tokens == 4 * 5 + 9 + 12 + 16
    # 2 layers of 12 x 32 x 32, and scores: 2 x 32 for each pair of tokens, a layer.
    pairs = sum(length**2 for length in LENGTHS)
    assert padded.flops == by_length.flops == pytest.approx(6 * 2 * (51 * 12 * 32 * 32 + 2 * 32 * pairs))
    num_masked = sum(map(len, window.masked))
    assert 0 < num_masked < 51
    assert padded.flops - packed.flops == pytest.approx(6 * (51 - num_masked) * 8 * 32 * 32)
