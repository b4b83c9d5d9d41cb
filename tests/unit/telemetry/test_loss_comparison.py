"""A client that always reports another loss than the others is told once and not believed."""

from __future__ import annotations

import pytest

from fedbert_ds.telemetry.loss_comparison import LossComparison


def window(**means: float) -> dict[str, tuple[float, int]]:
    return {client: (50 * mean, 50) for client, mean in means.items()}


@pytest.mark.parametrize("lie", [0.0, 1.0, 40.0, 1e4])
def test_a_lie_is_told_once_there_are_tokens_enough_to_tell(lie: float) -> None:
    comparison = LossComparison()
    for _ in range(3):
        assert comparison.add(window(ada=6.0, bo=7.0, cy=5.0, liar=lie)) == [] and not comparison.outlying
    (told,) = comparison.add(window(ada=6.0, bo=7.0, cy=5.0, liar=lie))
    assert told.startswith(f"client liar reports a loss of {lie:.3g}, the median client 5.5") or "6" in told
    assert comparison.outlying == {"liar"}
    assert comparison.add(window(ada=6.0, bo=7.0, cy=5.0, liar=lie)) == [], "once"
    for _ in range(30):
        comparison.add(window(ada=6.0, bo=7.0, cy=5.0, liar=6.0))
    assert not comparison.outlying, "what counts is the last windows"


def test_honest_clients_of_other_texts_and_two_clients_are_never_told() -> None:
    comparison = LossComparison()
    for _ in range(30):
        assert comparison.add(window(ada=2.0, bo=7.0, cy=6.5, di=8.3)) == []
    two = LossComparison()
    for _ in range(30):
        assert two.add(window(ada=0.0, bo=7.0)) == [], "nobody can say which of two is right"
    assert not comparison.outlying and not two.outlying
