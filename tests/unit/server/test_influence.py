"""Activations and gradients count for so many times what is typical; honest ones are left alone."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from fedbert_ds.errors import WireError
from fedbert_ds.server.contract import Observed, Sizes
from fedbert_ds.server.influence import SLACK_ROWS, Influence
from fedbert_kernels.encoded import Encoded

WIDTH = 64
FIRST = Sizes(row=8.0, token=0.5)
CODECS = ("fp32", "bf16", "int8", "fp8_e4m3", "int4_hadamard")


def rows(count: int, size: float, seed: int = 1) -> Tensor:
    """Random rows whose norms are about `size`."""
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)) * size / math.sqrt(WIDTH)


class Told(list[tuple[str, str, float]]):
    def __call__(self, client: str, what: str, times: float) -> None:
        self.append((client, what, times))


def made(first: Sizes | None = FIRST, times: float | None = 10.0) -> tuple[Influence, Told]:
    told = Told()
    influence = Influence(times, first, told)
    influence.begin(100)
    return influence, told


def seen(row: float, token: float) -> Observed:
    return Observed(rows=4, row_squares=4 * row**2, masked=2, gradient_squares=2 * token**2)


@pytest.mark.parametrize("codec", CODECS)
def test_honest_pieces_are_the_very_same_object(codec: str) -> None:
    influence, told = made()
    for count in (1, 3, 200):
        activations = Encoded.of(rows(count, 8.0), codec)
        gradient = Encoded.of(rows(count, 0.5 / 100), codec)
        assert influence.activations("ada", activations) is activations
        assert influence.gradient("ada", gradient) is gradient
    assert told == []


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("count", [1, 50])
def test_what_is_too_large_is_scaled_down_to_the_bound_and_told(codec: str, count: int) -> None:
    influence, told = made()
    slack = math.sqrt(count + SLACK_ROWS)
    lie = Encoded.of(rows(count, 1e4), codec)
    shrunk = influence.activations("liar", lie)
    # What codes of few bits make a row's size is an upper bound of it.
    assert shrunk.norm <= 10.0 * 8.0 * slack * 1.01 and shrunk.norm > (10.0 if codec == "fp32" else 1.0) * 8.0
    torch.testing.assert_close(shrunk.decode() / shrunk.norm, lie.decode() / lie.norm, rtol=0.02, atol=1e-4)
    lie = Encoded.of(rows(count, 1e5), codec)
    shrunk = influence.gradient("liar", lie)
    assert shrunk.norm == pytest.approx(10.0 * 0.5 / 100 * slack, rel=0.02)
    torch.testing.assert_close(shrunk.decode() / shrunk.norm, lie.decode() / lie.norm, rtol=0.02, atol=1e-4)
    assert [(client, what) for client, what, _ in told] == [("liar", "activations"), ("liar", "gradient")]
    assert all(times > 100 / slack for _, _, times in told)


@pytest.mark.parametrize("size", [0.0, 1e-12])
def test_activations_that_are_nothing_are_refused_where_they_arrive(size: float) -> None:
    """A body that divides by their size would make its gradients infinite."""
    influence, _ = made()
    influence.check("client ada", Encoded.of(rows(3, 8.0), "fp32"))
    values = torch.cat([rows(3, 8.0), rows(1, size)])
    with pytest.raises(WireError, match=r"client liar: a row of size .*; 8 is typical"):
        influence.check("client liar", Encoded.of(values, "fp32"))


def test_a_row_that_is_nearly_nothing_is_scaled_up() -> None:
    influence, told = made()
    values = torch.cat([rows(3, 8.0), rows(1, 8e-4)])
    raised = influence.activations("liar", Encoded.of(values, "fp32")).decode()
    assert torch.equal(raised[:3], values[:3])
    assert float(raised[3].norm()) == pytest.approx(8.0 / 10.0**2, rel=1e-4)
    assert [(client, what) for client, what, _ in told] == [("liar", "activations")]


@pytest.mark.parametrize("times", [None, 10.0])
def test_without_a_bound_or_anything_that_is_typical_all_counts(times: float | None) -> None:
    influence, told = made(None if times else Sizes(8.0, 0.5), times)
    lie = Encoded.of(rows(2, 1e5), "fp32")
    influence.check("liar", Encoded.of(torch.zeros(1, WIDTH), "fp32"))
    assert influence.activations("liar", lie) is lie and influence.gradient("liar", lie) is lie and told == []


def limits(influence: Influence) -> tuple[float, float]:
    """What of a single row still counts."""
    lie = Encoded.of(rows(1, 1e6), "fp32")
    return influence.activations("liar", lie).norm, influence.gradient("liar", lie).norm


def test_what_is_typical_follows_the_clients_of_all_ranks_and_no_liars() -> None:
    influence, _ = made()
    before = limits(influence)
    honest: Mapping[str, Observed] = {"ada": seen(16.0, 1.0), "bo": seen(16.0, 1.0)}
    liars = {"liar": seen(1e6, 1e6)}
    influence.learn([honest, liars])
    after = limits(influence)
    assert after == pytest.approx((2 * before[0], 2 * before[1]))
    influence.learn([{"ada": seen(16.0, 1.0)}, {}])
    assert limits(influence) == after, "who sends nothing keeps its vote"


def test_a_client_has_one_vote_however_much_it_sends() -> None:
    influence, _ = made()
    influence.learn([{"ada": seen(8.0, 0.5), "bo": seen(8.0, 0.5)}])
    before = limits(influence)
    influence.begin(100)
    for _ in range(50):
        influence.activations("liar", Encoded.of(rows(9, 1e5), "fp32"))
        influence.gradient("liar", Encoded.of(rows(9, 1e5), "fp32"))
    influence.learn([influence.take()])
    assert limits(influence) == before and influence.take().keys() == {"liar"}


def test_sizes_are_of_a_token_whatever_the_window() -> None:
    """And what was observed of a window that is undone counts for nothing."""
    typical = []
    for masked_tokens in (10, 1000):
        influence, _ = made(None)
        influence.begin(7)
        influence.gradient("ada", Encoded.of(rows(4, 1e5), "fp32"))
        influence.begin(masked_tokens)
        influence.activations("ada", Encoded.of(rows(4, 8.0), "fp32"))
        influence.gradient("ada", Encoded.of(rows(4, 3.0 / masked_tokens), "fp32"))
        influence.losses({"ada": (9.0, 4)})
        observed = influence.take()["ada"]
        assert (observed.loss_sum, observed.loss_tokens, observed.masked) == (9.0, 4, 4)
        typical.append(math.sqrt(observed.gradient_squares / observed.masked))
    assert typical[0] == pytest.approx(typical[1]) == pytest.approx(3.0, rel=0.3)


def test_a_resumed_rank_bounds_as_the_one_before_would() -> None:
    influence, _ = made()
    influence.learn([{"ada": seen(3.0, 0.1), "bo": seen(5.0, 0.3), "cy": seen(4.0, 0.2)}])
    resumed, _ = made()
    resumed.load_state(influence.state())
    resumed.begin(100)
    assert limits(resumed) == limits(influence)
