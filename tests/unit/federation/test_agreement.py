"""Two run files that must agree: what is compared, and how a difference is told."""

from __future__ import annotations

import pytest

from fedbert_ds.config import RunConfig
from fedbert_ds.federation.agreement import agreement, disagreement

SAME = agreement(RunConfig())


def test_what_does_not_move_the_client_model_may_differ() -> None:
    other = RunConfig(
        run={"directory": "elsewhere", "seed": 9, "save_every": 7}, server={"port": 1}, window={"tokens": 5000},
        wire={"activations": "int8"},
    )  # fmt: skip
    assert disagreement(SAME, agreement(other)) is None


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"federation": {"mode": "parallel"}}, 'federation.mode is "synchronous" at the aggregator and "parallel" at'),
        ({"optimizer": {"lr": 0.5}}, "optimizer.lr is 0.0001 at the aggregator and 0.5 at the server"),
        ({"cut": {"layers": 1}}, 'cut is "embeddings" at the aggregator and {"layers": 1}'),
        ({"run": {"windows": 7}}, "run.windows is 600 at the aggregator and 7"),
        ({"wire": {"updates": "int8"}}, "wire.updates is"),
        ({"model": {"hidden_size": 64}}, "model.hidden_size is 128"),
        ({"model": {"checkpoint": "bert"}}, "model.checkpoint is false"),
    ],
)
def test_the_first_difference_is_named(sections: dict, told: str) -> None:
    found = disagreement(SAME, agreement(RunConfig(**sections)))
    assert found is not None and told in found


@pytest.mark.parametrize("nonsense", ["", "[]", "{", "[" * 100_000])
def test_nonsense_is_no_agreement(nonsense: str) -> None:
    found = disagreement(SAME, nonsense)
    assert found is not None and "install the same" in found


def test_a_key_that_only_one_side_knows_is_a_difference() -> None:
    assert disagreement(SAME, "{}") is not None
    assert "nothing.known" in (disagreement(SAME, SAME[:-1] + ', "a.nothing.known": 1}') or "")
