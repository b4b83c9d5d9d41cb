"""The mean cosine of a word table, beside the definition and where it is known."""

from __future__ import annotations

import math

import pytest
import torch

from fedbert_ds.evaluation.word_table import mean_cosine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_mean_over_all_pairs(dtype: torch.dtype) -> None:
    table = torch.randn(17, 5, generator=torch.Generator().manual_seed(3)).to(dtype) + 0.5
    rows = table.double()
    pairs = [torch.cosine_similarity(rows[a], rows[b], dim=0) for a in range(17) for b in range(17) if a != b]
    assert mean_cosine(table) == pytest.approx(float(torch.stack(pairs).mean()), abs=1e-12)


def test_one_way_every_way_and_opposite_ways() -> None:
    assert mean_cosine(torch.tensor([[1.0, 2.0], [2.0, 4.0], [0.5, 1.0]])) == pytest.approx(1.0)
    assert mean_cosine(torch.eye(6)) == pytest.approx(0.0, abs=1e-12)
    assert mean_cosine(torch.tensor([[1.0, 0.0], [-3.0, 0.0]])) == pytest.approx(-1.0)


def test_rows_of_zeros_do_not_count() -> None:
    table = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    with_padding = torch.cat([torch.zeros(2, 4), table])
    assert mean_cosine(with_padding) == mean_cosine(table)
    with pytest.raises(ValueError, match="a table of 3 rows has no two that are not zero"):
        mean_cosine(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_diverged_has_no_number_and_is_no_error(value: float) -> None:
    assert math.isnan(mean_cosine(torch.full((4, 3), value)))
    assert math.isnan(mean_cosine(torch.cat([torch.eye(3), torch.full((1, 3), value)])))
