"""Which parts of a half are exchanged after which window, and how exactly."""

from __future__ import annotations

import pytest

from fedbert_ds.config import FederationSection, WireSection
from fedbert_ds.federation.strategy import exchange_after, exchange_codec, is_exchanged


@pytest.mark.parametrize(
    ("mode", "average_every", "expected"),
    [
        ("synchronous", 1, ["gradients"] * 6),
        ("synchronous", 3, ["gradients"] * 6),  # average_every is for `parallel`
        ("parallel", 1, ["weights"] * 6),
        ("parallel", 2, ["nothing", "weights"] * 3),
        ("parallel", 3, ["nothing", "nothing", "weights"] * 2),
        ("parallel", 7, ["nothing"] * 6),
    ],
)
def test_exchange_after_each_window(mode: str, average_every: int, expected: list[str]) -> None:
    federation = FederationSection(mode=mode, average_every=average_every)
    assert [exchange_after(federation, window) for window in range(6)] == expected


@pytest.mark.parametrize(
    ("mode", "average_scope", "embeddings", "head"),
    [
        ("parallel", "embeddings", True, False),
        ("parallel", "head", False, True),
        ("parallel", "embeddings+head", True, True),
        # One model: everything is summed, whatever the scope says.
        ("synchronous", "embeddings", True, True),
        ("synchronous", "head", True, True),
        ("synchronous", "embeddings+head", True, True),
    ],
)
def test_what_is_exchanged(mode: str, average_scope: str, embeddings: bool, head: bool) -> None:
    federation = FederationSection(mode=mode, average_scope=average_scope)
    assert (is_exchanged(federation, "embeddings"), is_exchanged(federation, "head")) == (embeddings, head)


@pytest.mark.parametrize("mode", ["synchronous", "parallel"])
def test_what_is_exchanged_is_coded_as_the_run_file_says(mode: str) -> None:
    federation = FederationSection(mode=mode)
    assert exchange_codec(federation, WireSection(halves="int8")) == "int8"
    assert exchange_codec(federation, WireSection()) == "fp32"
