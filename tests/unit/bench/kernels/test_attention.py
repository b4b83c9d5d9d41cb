"""Attention: ours and padded SDPA are right, and batches hold what they should."""

import pytest
import torch

from fedbert_ds.bench.kernels import attention
from fedbert_ds.bench.kernels.attention import Packed, attention_problem, draw_lengths
from fedbert_ds.bench.kernels.problem import BOTH, FORWARD, OURS

CPU = torch.device("cpu")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("lengths", [[5, 1, 40, 17, 30], [24] * 4])
def test_attention(outcomes, lengths: list[int], dropout: float, monkeypatch) -> None:
    monkeypatch.setattr(attention, "PADDED_BATCH", 2)
    found = outcomes(attention_problem("x", lengths, 2, 32, torch.float32, dropout, CPU, compiled=False))
    for what in (FORWARD, BOTH):
        assert found[OURS, what] is None and found["SDPA, padded", what] is None
        assert "--quick" in found["torch.compile, padded", what]


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


def test_drawn_lengths_fill_the_tokens_and_repeat() -> None:
    lengths = draw_lengths([7, 20, 33], 500)
    assert 500 - 33 < sum(lengths) <= 500 and set(lengths) == {7, 20, 33}
    assert draw_lengths([7, 20, 33], 500) == lengths
