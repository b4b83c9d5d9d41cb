"""The joins: who is let in, who is refused and why, where a run begins, who sits where."""

from __future__ import annotations

from concurrent.futures import Future
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbert_ds.config import parse_config
from fedbert_ds.errors import WireError
from fedbert_ds.server.admission import LONGEST_NAME, Expectation, Joins, start_of, welcome_all
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.messages import PROTOCOL

EXPECTATION = Expectation("vocabulary", "shape", '"embeddings"')


def hello(client: str = "ada", **changes: object) -> pb.Hello:
    return pb.Hello(**({"protocol": PROTOCOL, "client": client, "shard_characters": 1000} | changes))


def join(joins: Joins, message: pb.Hello) -> Future[pb.Welcome]:
    answer: Future[pb.Welcome] = Future()
    joins.admit(message, answer)
    return answer


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (
            hello(protocol=PROTOCOL + 1),
            f"speaks protocol {PROTOCOL + 1}, this server {PROTOCOL}; install the same fedbert-ds on both",
        ),
        (hello(client=""), "a client without a name; give it one with --id"),
        (hello(client="x" * (LONGEST_NAME + 1)), f"at most {LONGEST_NAME} printable characters; give it another --id"),
        (hello(client="ada\x1b[31m"), f"at most {LONGEST_NAME} printable characters; give it another --id"),
        (hello(client="bo"), "client bo has joined already; give each client its own --id"),
        (hello(vocabulary_hash="mine"), "another vocabulary than the run; drop --tokenizer or name the run's"),
        (hello(shape_hash="mine"), "another model than the run; drop --model or name the run's"),
        (hello(cut='"rows"'), 'insists on cut "rows", the run has "embeddings"; drop --cut'),
        (hello(shard_characters=0), "client ada has no text; check its --data"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_refusal_says_what_to_change_and_the_roster_goes_on(message: pb.Hello, reason: str) -> None:
    joins = Joins(3, EXPECTATION)
    join(joins, hello("bo"))
    answer: Future[pb.Welcome] = Future()
    with pytest.raises(WireError) as caught:
        joins.admit(message, answer)
    assert str(caught.value).endswith(reason)
    assert answer.exception(timeout=0) is caught.value, "the client gets the same sentence"
    assert joins.clients == ("bo",)
    join(joins, hello("ada"))
    join(joins, hello("cy"))
    assert joins.is_complete


def test_what_a_client_insists_on_may_be_what_the_run_has() -> None:
    joins = Joins(1, EXPECTATION)
    join(joins, hello(vocabulary_hash="vocabulary", shape_hash="shape", cut='"embeddings"'))
    assert joins.is_complete


def test_one_too_many_is_refused() -> None:
    joins = Joins(1, EXPECTATION)
    join(joins, hello("ada"))
    with pytest.raises(WireError, match=r"client bo: all 1 clients have joined; raise clients\.expected"):
        join(joins, hello("bo"))


@pytest.mark.parametrize("message", [hello("ada"), hello("ada", shard_characters=0), hello("bo")])
def test_a_client_that_left_before_it_was_looked_at_does_no_harm(message: pb.Hello) -> None:
    """Its call is cancelled while the server still prepares its text, so no answer can be given any
    more.
    """
    joins = Joins(2, EXPECTATION)
    join(joins, hello("bo"))
    answer: Future[pb.Welcome] = Future()
    assert answer.cancel()
    with suppress(WireError):
        joins.admit(message, answer)
    joins.withdraw(message)
    assert joins.clients == ("bo",)
    assert not joins.is_complete


def test_a_namesake_that_leaves_takes_nobody_along() -> None:
    joins = Joins(2, EXPECTATION)
    first = hello("ada")
    join(joins, first)
    second = hello("ada")
    with pytest.raises(WireError):
        join(joins, second)
    joins.withdraw(second)
    assert joins.clients == ("ada",)
    joins.withdraw(first)
    assert joins.clients == ()
    join(joins, second)
    assert joins.clients == ("ada",)


def test_everybody_is_welcomed_who_is_still_there() -> None:
    joins = Joins(2, EXPECTATION)
    ada, bo = join(joins, hello("ada")), join(joins, hello("bo"))
    ada.cancel()
    for client in joins.clients:
        joins.welcome(client, pb.Welcome(endpoint=client))
    assert bo.result(timeout=0).endpoint == "bo"
    joins.refuse_all(WireError("the run ends"))  # an answer is given once
    assert bo.result(timeout=0).endpoint == "bo"


def test_when_the_run_does_not_start_everybody_hears_why() -> None:
    joins = Joins(3, EXPECTATION)
    answers = [join(joins, hello(name)) for name in ("ada", "bo")]
    answers[0].cancel()
    error = WireError("60 s are over")
    joins.refuse_all(error)
    assert answers[1].exception(timeout=0) is error


# -- resuming --------------------------------------------------------------------------------------

WINDOWS = st.frozensets(st.integers(1, 8), max_size=4)


@settings(deadline=None)
@given(server=WINDOWS, clients=st.lists(WINDOWS, min_size=1, max_size=4))
def test_a_run_begins_at_the_newest_window_that_all_have(server: frozenset[int], clients: list[frozenset[int]]) -> None:
    joins = Joins(len(clients), Expectation("v", "s", "c", server))
    for number, windows in enumerate(clients):
        message = hello(f"client-{number}", saved_windows=windows)
        if not windows:
            with pytest.raises(WireError, match="has no saved state to resume from; give it the --state folder"):
                join(joins, message)
            return
        join(joins, message)
    common = [window for window in range(1, 9) if window in server and all(window in one for one in clients)]
    if common:
        assert joins.first_window() == common[-1]
    else:
        with pytest.raises(WireError, match="no window is saved by the server") as caught:
            joins.first_window()
        listed = ", ".join(map(str, sorted(server))) or "none"
        assert f"({listed})" in str(caught.value)


@settings(deadline=None)
@given(server=WINDOWS.filter(bool), clients=st.lists(WINDOWS, min_size=1, max_size=4))
def test_where_clients_keep_no_state_a_run_begins_at_the_servers_newest_window(
    server: frozenset[int], clients: list[frozenset[int]]
) -> None:
    joins = Joins(len(clients), Expectation("v", "s", "c", server, clients_save=False))
    for number, windows in enumerate(clients):
        join(joins, hello(f"client-{number}", saved_windows=windows))
    assert joins.first_window() == max(server)


def test_a_new_run_begins_at_zero_whatever_clients_have_saved() -> None:
    joins = Joins(2, EXPECTATION)
    join(joins, hello("ada", saved_windows=[3, 5]))
    join(joins, hello("bo"))
    assert joins.first_window() == 0


# -- seats -----------------------------------------------------------------------------------------


def test_seats_follow_from_names_and_texts_alone() -> None:
    seats = []
    for order in (("ada", "bo", "cy"), ("cy", "ada", "bo")):
        joins = Joins(3, EXPECTATION)
        for name in order:
            join(joins, hello(name, shard_characters={"ada": 500, "bo": 300, "cy": 200}[name]))
        seats.append(joins.seats(world_size=2, window_tokens=1000, share="data"))
    places = [{name: (seat.rank, seat.tokens) for name, seat in one.items()} for one in seats]
    assert places[0] == places[1] == {"ada": (0, 500), "bo": (1, 300), "cy": (1, 200)}
    sessions = [seat.session for one in seats for seat in one.values()]
    assert len(set(sessions)) == 6 and all(len(session) == 32 for session in sessions), "sessions are drawn anew"


def test_seats_with_equal_shares() -> None:
    joins = Joins(2, EXPECTATION)
    join(joins, hello("ada", shard_characters=999))
    join(joins, hello("bo", shard_characters=1))
    seats = joins.seats(world_size=1, window_tokens=1001, share="equal")
    assert {name: seat.tokens for name, seat in seats.items()} == {"ada": 500, "bo": 500}


def test_a_welcome_says_where_the_text_goes_on_and_nothing_to_one_that_was_not_there() -> None:
    joins = Joins(2, Expectation("v", "s", "c", frozenset({4}), clients_save=False))
    answers = {name: join(joins, hello(name)) for name in ("ada", "bo")}
    config = parse_config({"clients": {"expected": 2, "local": 0}}, "test")
    start = start_of(joins, world_size=1, window=config.window)
    ada, dee = {"epoch": 2, "position": 7, "sequences": 9}, {"epoch": 0, "position": 0, "sequences": 1}
    welcome_all(joins, start, config, ["here:1"], b"", "{}", {"ada": ada, "dee": dee})
    told = {name: answer.result(timeout=0) for name, answer in answers.items()}
    assert told["ada"].cursor == pb.Cursor(**ada) and not told["bo"].HasField("cursor")
    assert {welcome.window for welcome in told.values()} == {4}


def test_a_welcome_names_the_aggregator_with_a_session_that_is_not_the_ranks() -> None:
    joins = Joins(1, EXPECTATION)
    answer = join(joins, hello("ada"))
    section = {"address": "there:5", "secret": "file"}
    config = parse_config({"clients": {"expected": 1, "local": 0}, "aggregator": section}, "test")
    start = start_of(joins, world_size=1, window=config.window)
    welcome_all(joins, start, config, ["here:1"], b"", "{}", {})
    welcome = answer.result(timeout=0)
    assert welcome.aggregator == "there:5" and welcome.aggregator_session == start.seats["ada"].aggregator_session
    assert welcome.session != welcome.aggregator_session != ""
