"""ZeRO stage 3's layers: which are gathered together, and that none stays whole."""

from __future__ import annotations

import json
from typing import Any

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from hypothesis import given
from hypothesis import strategies as st
from unit.server.body.gather_worker import CASES, LAYERS
from unit.server.body.test_engine import two_ranks

from fedbert_ds.server.body.layer_weights import spans


@given(st.lists(st.integers(0, 9), min_size=1), st.integers(0, 20))
def test_spans_divide_neighbours_and_are_as_long_as_may_be(sizes: list[int], most: int) -> None:
    found = spans(sizes, most)
    assert [place for span in found for place in range(len(sizes))[span]] == list(range(len(sizes)))
    totals = [sum(sizes[span]) for span in found]
    assert all(total <= most or span.stop - span.start == 1 for total, span in zip(totals, found, strict=True))
    for total, following in zip(totals, found[1:], strict=False):
        assert total + sizes[following.start] > most


@pytest.mark.parametrize(("width", "layers", "expected"), [(768, 12, [7, 5]), (1024, 24, [3] * 8)])
def test_layers_of_bert_that_deepspeeds_default_gathers_together(width: int, layers: int, expected: list[int]) -> None:
    found = spans([12 * width**2] * layers, DeepSpeedZeroConfig().prefetch_bucket_size)
    assert [span.stop - span.start for span in found] == expected


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """By rank, then by case."""
    folder = two_ranks("gather_worker.py", tmp_path_factory.mktemp("gather"))
    return [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_a_layer_is_whole_while_it_computes_and_no_longer(seen: list[dict[str, Any]], case: str) -> None:
    """Forward and backward, also where it computes again in backward."""
    units = {"two together": [[0, 1], [2]], "all together": [[0, 1, 2]]}.get(case, [[0], [1], [2]])
    by_layer = [unit for unit in units for _ in unit]
    for of_rank in seen:
        assert of_rank[case]["layers"] == {"forward": by_layer, "backward": by_layer} and len(by_layer) == LAYERS
        assert of_rank[case]["otherwise"] == [[], [], []]
        assert of_rank[case]["collectives"] == [len(units)] * 2
