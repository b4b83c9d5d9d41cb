"""The plan of a window: packing, equal counts over ranks, seats and shares."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbert_ds.server.window import Piece, assign_clients, plan_window, window_shares
from fedbert_ds.wire.messages import Manifest

CAPACITY = 16

SEQUENCES = st.lists(
    st.integers(1, CAPACITY).flatmap(lambda length: st.tuples(st.just(length), st.integers(0, length))),
    min_size=1,
    max_size=12,
)


@st.composite
def federations(draw: st.DrawFn) -> list[list[Manifest]]:
    """Manifests of one to four ranks, in any order of arrival."""
    names = draw(st.lists(st.text("abcxyz", min_size=1, max_size=3), unique=True, max_size=8))
    ranks: list[list[Manifest]] = [[] for _ in range(draw(st.integers(1, 4)))]
    for name in names:
        lengths, masked = zip(*draw(SEQUENCES), strict=True)
        ranks[draw(st.integers(0, len(ranks) - 1))].append(Manifest(name, 3, lengths, masked))
    return ranks


@settings(max_examples=50, deadline=None)
@given(ranks=federations())
def test_every_sequence_is_in_one_piece_of_one_micro_batch(ranks: list[list[Manifest]]) -> None:
    plan = plan_window(3, ranks, CAPACITY)
    assert plan.window == 3
    assert plan.masked_tokens == sum(sum(manifest.masked) for rank in ranks for manifest in rank)
    assert len(plan.ranks) == len(ranks)
    for manifests, micro_batches in zip(ranks, plan.ranks, strict=True):
        placed = [piece for micro_batch in micro_batches for piece in micro_batch.pieces]
        assert [piece.client for piece in placed] == sorted(piece.client for piece in placed)
        for manifest in manifests:
            mine = [piece for piece in placed if piece.client == manifest.client]
            end = 0
            for piece in mine:
                assert piece.first_sequence == end and piece.num_sequences > 0
                end += piece.num_sequences
                assert piece.tokens == sum(manifest.lengths[piece.first_sequence : end])
                assert piece.masked == sum(manifest.masked[piece.first_sequence : end])
            assert end == len(manifest.lengths)


@settings(max_examples=50, deadline=None)
@given(ranks=federations())
def test_micro_batches_fit_and_ranks_keep_step(ranks: list[list[Manifest]]) -> None:
    plan = plan_window(0, ranks, CAPACITY)
    counts = {len(micro_batches) for micro_batches in plan.ranks}
    assert len(counts) == 1 and counts.pop() >= 1
    indices = [micro_batch.index for rank in plan.ranks for micro_batch in rank]
    assert len(set(indices)) == len(indices)
    for micro_batches in plan.ranks:
        filled = [micro_batch for micro_batch in micro_batches if micro_batch.pieces]
        assert micro_batches[: len(filled)] == tuple(filled), "dummies come last"
        for micro_batch in micro_batches:
            assert micro_batch.tokens <= CAPACITY
            clients = [piece.client for piece in micro_batch.pieces]
            assert len(set(clients)) == len(clients), "one piece for each client"
        # Next-fit: two neighbours together always hold more than one micro-batch can.
        for one, other in itertools.pairwise(filled):
            assert one.tokens + other.tokens > CAPACITY
    longest = max(sum(1 for micro_batch in rank if micro_batch.pieces) for rank in plan.ranks)
    assert len(plan.ranks[0]) == max(1, longest), "no more dummies than the fullest rank asks for"


@settings(max_examples=50, deadline=None)
@given(ranks=federations(), data=st.data())
def test_the_plan_does_not_depend_on_who_came_first(ranks: list[list[Manifest]], data: st.DataObject) -> None:
    shuffled = [data.draw(st.permutations(rank)) for rank in ranks]
    assert plan_window(0, shuffled, CAPACITY) == plan_window(0, ranks, CAPACITY)


def test_packing_by_hand() -> None:
    ada = Manifest("ada", 0, (4, 3, 5), (1, 0, 2))
    bo = Manifest("bo", 0, (2, 8), (1, 3))
    cy = Manifest("cy", 0, (8,), (4,))
    plan = plan_window(0, [[bo, ada], [cy]], 8)
    assert plan.masked_tokens == 11
    assert [micro_batch.pieces for micro_batch in plan.ranks[0]] == [
        (Piece("ada", 0, 2, tokens=7, masked=1),),  # 4 + 3; 5 more do not fit
        (Piece("ada", 2, 1, tokens=5, masked=2), Piece("bo", 0, 1, tokens=2, masked=1)),  # 5, shared with 2 of bo's
        (Piece("bo", 1, 1, tokens=8, masked=3),),  # exactly full
    ]
    assert [micro_batch.pieces for micro_batch in plan.ranks[1]] == [
        (Piece("cy", 0, 1, tokens=8, masked=4),),
        (),  # dummies, so that both ranks run three
        (),
    ]
    assert [[micro_batch.index for micro_batch in rank] for rank in plan.ranks] == [[0, 1, 2], [3, 4, 5]]


def test_a_rank_without_clients_still_runs_one_micro_batch() -> None:
    plan = plan_window(0, [[], []], 8)
    assert [[micro_batch.pieces for micro_batch in rank] for rank in plan.ranks] == [[()], [()]]
    assert plan.masked_tokens == 0


def test_a_sequence_longer_than_a_micro_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="a sequence of 9 tokens does not fit a micro-batch of 8"):
        plan_window(0, [[Manifest("ada", 0, (4, 9), (1, 1))]], 8)


SHARES = st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.integers(1, 10_000), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(shares=SHARES, world_size=st.integers(1, 6))
def test_ranks_are_balanced(shares: dict[str, int], world_size: int) -> None:
    """Every client has a rank, and no two ranks differ by more than one client could mend (heaviest first, LPT)."""
    ranks = assign_clients(shares, world_size)
    assert ranks.keys() == shares.keys()
    loads = [sum(shares[c] for c, rank in ranks.items() if rank == number) for number in range(world_size)]
    for number, load in enumerate(loads):
        if mine := [shares[client] for client, rank in ranks.items() if rank == number]:
            # The last, so the lightest, of a rank's clients went there because it was the lightest rank then.
            assert load - min(mine) <= min(loads)
    best_possible = max(max(shares.values()), -(-sum(shares.values()) // world_size))
    assert max(loads) <= (4 / 3) * best_possible + max(shares.values())
    assert assign_clients(dict(reversed(shares.items())), world_size) == ranks, "names decide, not the order of joins"


def test_seats_by_hand() -> None:
    assert assign_clients({"a": 5, "b": 4, "c": 3, "d": 3, "e": 3}, 2) == {"a": 0, "b": 1, "c": 1, "d": 0, "e": 1}


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers(1, 10**12), min_size=1, max_size=8),
    window_tokens=st.integers(1, 10**7),
)
def test_shares_follow_the_shards(sizes: dict[str, int], window_tokens: int) -> None:
    shares = window_shares(sizes, window_tokens, "data")
    total = sum(sizes.values())
    for client, size in sizes.items():
        assert shares[client] >= 1
        exact = window_tokens * size / total
        assert shares[client] == 1 or exact - 1 - 1e-6 * exact <= shares[client] <= exact * (1 + 1e-9)
    assert sum(shares.values()) <= window_tokens + len(sizes)
    assert set(window_shares(sizes, window_tokens, "equal").values()) == {max(1, window_tokens // len(sizes))}
