"""BERT's published sizes."""

from __future__ import annotations

import pytest

from fedbert_ds.init.sizes import SIZES


@pytest.mark.parametrize(
    ("name", "layers", "hidden", "heads"),
    [
        ("tiny", 2, 128, 2),
        ("mini", 4, 256, 4),
        ("small", 4, 512, 8),
        ("medium", 8, 512, 8),
        ("base", 12, 768, 12),
        ("large", 24, 1024, 16),
    ],
)
def test_they_are_the_published_ones(name: str, layers: int, hidden: int, heads: int) -> None:
    size = SIZES[name]
    assert (size.layers, size.hidden, size.heads) == (layers, hidden, heads)


def test_narrow_models_begin_with_larger_weights() -> None:
    assert SIZES["base"].initializer_range == SIZES["large"].initializer_range == 0.02
    assert SIZES["tiny"].initializer_range == pytest.approx(0.02 * 6**0.5, rel=1e-2)
