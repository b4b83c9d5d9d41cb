"""Who sits where and brings how much: balanced over ranks, in proportion to the shards."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from fedbert_ds.server.queue.seats import assign_clients, capped, window_shares

SHARES = st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.integers(1, 10_000), min_size=1, max_size=12)


@settings(max_examples=60)
@given(shares=SHARES, world_size=st.integers(1, 6))
def test_ranks_are_balanced(shares: dict[str, int], world_size: int) -> None:
    """Every client has a rank, and no two ranks differ by more than one client could mend (heaviest
    first, LPT).
    """
    ranks = assign_clients(shares, world_size)
    assert ranks.keys() == shares.keys()
    loads = [sum(shares[c] for c, rank in ranks.items() if rank == number) for number in range(world_size)]
    for number, load in enumerate(loads):
        if mine := [shares[client] for client, rank in ranks.items() if rank == number]:
            # The last, so the lightest, of a rank's clients went there because it was the lightest
            # rank then.
            assert load - min(mine) <= min(loads)
    best_possible = max(max(shares.values()), -(-sum(shares.values()) // world_size))
    assert max(loads) <= (4 / 3) * best_possible + max(shares.values())
    assert assign_clients(dict(reversed(shares.items())), world_size) == ranks, "names decide, not the order of joins"


def test_seats_by_hand() -> None:
    assert assign_clients({"a": 5, "b": 4, "c": 3, "d": 3, "e": 3}, 2) == {"a": 0, "b": 1, "c": 1, "d": 0, "e": 1}


@settings(max_examples=60)
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


@settings(max_examples=60)
@given(
    sizes=st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers(1, 10**9), min_size=1, max_size=8),
    window_tokens=st.integers(1000, 10**7),
    data=st.data(),
)
def test_participants_bring_so_much_that_a_window_is_full_on_average(
    sizes: dict[str, int], window_tokens: int, data: st.DataObject
) -> None:
    participants = data.draw(st.integers(1, len(sizes)), label="participants")
    equal = window_shares(sizes, window_tokens, "equal", participants)
    assert set(equal.values()) == {window_tokens // participants}
    shares = window_shares(sizes, window_tokens, "data", participants)
    # Of all windows, each client is in participants / K.
    mean = sum(shares.values()) * participants / len(sizes)
    assert window_tokens - participants <= mean <= window_tokens + len(sizes)
    everybody = window_shares(sizes, window_tokens, "data", len(sizes))
    assert everybody == window_shares(sizes, window_tokens, "data")


def test_a_claim_of_much_text_counts_for_so_many_times_the_median_clients() -> None:
    honest = {f"client-{n}": 1000 for n in range(9)}
    for claim in (4001, 10**12, 2**63):
        shares = window_shares(honest | {"liar": claim}, 1300, "data", largest=4.0)
        assert shares == dict.fromkeys(honest, 100) | {"liar": 400}
    assert window_shares(honest | {"rich": 4000}, 1300, "data", largest=4.0)["rich"] == 400
    assert window_shares(honest | {"liar": 2**63}, 1300, "data")["liar"] == 1299


@settings(max_examples=60)
@given(
    sizes=st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers(1000, 4000), min_size=1, max_size=8),
    window_tokens=st.integers(1, 10**7),
)
def test_texts_that_are_not_too_unequal_keep_their_shares(sizes: dict[str, int], window_tokens: int) -> None:
    assert window_shares(sizes, window_tokens, "data", largest=4.0) == window_shares(sizes, window_tokens, "data")


def test_whose_text_does_not_count_in_full_is_known() -> None:
    assert capped({"a": 100, "b": 401, "c": 100, "d": 90}, 4.0) == {"b": 4.01}
    assert capped({"a": 100, "b": 400}, 4.0) == {} == capped({"a": 5}, 1.0)
