"""The joins: who is let in, who is refused and why, where a run begins, who sits where."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbert_ds.config import WindowSection
from fedbert_ds.errors import WireError
from fedbert_ds.federation.sampler import Everybody, Sample, Sampler, Turns
from fedbert_ds.run_file import parse_config
from fedbert_ds.server.admission import (
    Expectation,
    Invitation,
    Joins,
    Members,
    Seat,
    answer_visitor,
    fill,
    new_session,
    start_of,
)
from fedbert_ds.server.network.events import JoinAsked
from fedbert_ds.server.queue.roster import next_window_of
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.identity import LONGEST_NAME
from fedbert_ds.wire.messages import PROTOCOL, parse_settings

EXPECTATION = Expectation("vocabulary", "shape", '"embeddings"')


def hello(client: str = "ada", **changes: object) -> pb.Hello:
    fields = {"protocol": PROTOCOL, "client": client, "shard_characters": 1000, "task": "masked_lm"}
    return pb.Hello(**(fields | changes))


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
        (
            hello(client="x" * (LONGEST_NAME + 1)),
            f"up to {LONGEST_NAME} letters, digits and .-_@+; give it another --id",
        ),
        (hello(client="ada\x1b[31m"), f"up to {LONGEST_NAME} letters, digits and .-_@+; give it another --id"),
        (hello(client="bo"), "client bo has joined already; give each client its own --id"),
        (hello(vocabulary_hash="mine"), "another vocabulary than the run; drop --tokenizer or name the run's"),
        (hello(shape_hash="mine"), "another model than the run; drop --model or name the run's"),
        (hello(cut='"rows"'), 'insists on cut "rows", the run has "embeddings"; drop --cut'),
        (
            hello(task="token_classification"),
            "client ada reads its files for token_classification, the run learns masked_lm; start it with --task "
            "masked_lm and files of that kind",
        ),
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


@given(server=WINDOWS, clients=st.lists(WINDOWS, min_size=1, max_size=4))
def test_a_run_begins_at_the_newest_window_that_most_have(
    server: frozenset[int], clients: list[frozenset[int]]
) -> None:
    """Those that lack its state, or all of their states, begin with the reference."""
    joins = Joins(len(clients), Expectation("v", "s", "c", server))
    for number, windows in enumerate(clients):
        join(joins, hello(f"client-{number}", saved_windows=windows))
    have = {window: sum(window in one for one in clients) for window in sorted(server)}
    first_window = joins.first_window()
    if not server:
        assert first_window == 0, "it was stopped before anything was saved"
        return
    assert have[first_window] == max(have.values())
    assert all(have[window] < have[first_window] for window in server if window > first_window)


@pytest.mark.parametrize(
    ("kept", "first_window"),
    [
        ([{4, 6}, {4, 6}], 6),
        ([{4, 6}, {4}], 4),  # 6 would make one of them begin anew
        ([{4, 6}, {2, 4}, set()], 4),
        ([{4, 6}, set()], 6),
        ([set(), set()], 6),
        ([{8}, {8}], 6),  # the server has not saved that one
    ],
    ids=str,
)
def test_some_clients_may_lack_their_states(kept: list[set[int]], first_window: int) -> None:
    joins = Joins(len(kept), Expectation("v", "s", "c", frozenset({2, 4, 6})))
    for number, windows in enumerate(kept):
        join(joins, hello(f"client-{number}", saved_windows=windows))
    start = start_of(joins, world_size=1, window=parse_config({}, "test").window)
    assert start.first_window == first_window
    members = Members(start.seats, Everybody(dict.fromkeys(start.seats, 0), 1))
    has_state = [members.has_state(f"client-{number}", first_window) for number in range(len(kept))]
    assert has_state == [first_window in windows for windows in kept]


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
    seats = joins.seats(1, WindowSection(tokens=1000, share="equal"))
    assert not seats["ada"].saved_windows, "they are of another run"


@pytest.mark.parametrize("run", ["another run", ""])
def test_states_of_another_run_are_refused_where_clients_keep_states(run: str) -> None:
    expectation = Expectation("v", "s", "c", frozenset({3, 5}), run="this run")
    joins = Joins(2, expectation)
    with pytest.raises(WireError, match="client ada has states of another run; give it another --state folder"):
        join(joins, hello("ada", saved_windows=[5], run=run))
    join(joins, hello("ada", run=run))
    join(joins, hello("bo", saved_windows=[3], run="this run"))
    assert joins.first_window() == 3
    seats = joins.seats(1, WindowSection(tokens=10, share="equal"))
    assert seats["ada"].saved_windows == frozenset() and seats["bo"].saved_windows == {3}
    indifferent = Joins(1, Expectation("v", "s", "c", frozenset({5}), clients_save=False, run="this run"))
    join(indifferent, hello("ada", saved_windows=[5], run=run))
    assert indifferent.seats(1, WindowSection(tokens=10, share="equal"))["ada"].saved_windows == frozenset()


def test_an_absurd_amount_of_text_is_refused_in_one_line() -> None:
    joins = Joins(2, EXPECTATION)
    with pytest.raises(WireError, match=r"client bo says it has 9.2e\+18 characters of text; at most 1e\+13 are sane"):
        join(joins, hello("bo", shard_characters=2**63))
    join(joins, hello("ada", shard_characters=10**13))


# -- seats -----------------------------------------------------------------------------------------


def test_seats_follow_from_names_and_texts_alone() -> None:
    seats = []
    for order in (("ada", "bo", "cy"), ("cy", "ada", "bo")):
        joins = Joins(3, EXPECTATION)
        for name in order:
            join(joins, hello(name, shard_characters={"ada": 500, "bo": 300, "cy": 200}[name]))
        seats.append(joins.seats(2, WindowSection(tokens=1000, share="data")))
    places = [{name: (seat.rank, seat.tokens) for name, seat in one.items()} for one in seats]
    assert places[0] == places[1] == {"ada": (0, 500), "bo": (1, 300), "cy": (1, 200)}
    sessions = [seat.session for one in seats for seat in one.values()]
    assert len(set(sessions)) == 6 and all(len(session) == 32 for session in sessions), "sessions are drawn anew"


def test_seats_with_equal_shares() -> None:
    joins = Joins(2, EXPECTATION)
    join(joins, hello("ada", shard_characters=999))
    join(joins, hello("bo", shard_characters=1))
    seats = joins.seats(1, WindowSection(tokens=1001, share="equal"))
    assert {name: seat.tokens for name, seat in seats.items()} == {"ada": 500, "bo": 500}


def test_a_welcome_names_the_aggregator_with_a_session_that_is_not_the_ranks() -> None:
    config = parse_config({"aggregator": {"address": "there:5", "secret": "file"}}, "test")
    seats = [Seat(0, "secret", 77), Seat(0, "secret", 77)]
    welcomes = [Invitation(config, ["here:1"], b"", "{}").to("ada", seat) for seat in seats]
    assert {welcome.aggregator for welcome in welcomes} == {"there:5"}
    assert len({seats[0].session, *(welcome.aggregator_session for welcome in welcomes)}) == 3
    alone = Invitation(parse_config({}, "test"), ["here:1"], b"", "{}").to("ada", seats[0])
    assert not alone.aggregator and not alone.aggregator_session


@pytest.mark.parametrize("clients_save", [False, True])
def test_a_seat_knows_the_states_its_client_has_kept(clients_save: bool) -> None:
    joins = Joins(1, Expectation("v", "s", "c", frozenset({4}), clients_save))
    join(joins, hello("ada", saved_windows=[3, 4]))
    seats = joins.seats(1, WindowSection(tokens=1000, share="equal"))
    assert seats["ada"].saved_windows == (frozenset({3, 4}) if clients_save else frozenset())


def test_members_are_whoever_has_a_seat() -> None:
    sampler = Everybody({"ada": 0, "bo": 0}, 1)
    members = Members({"ada": Seat(0, "first", 600), "bo": Seat(1, "first", 400)}, sampler)
    tokens = members.tokens
    members.admit({"bo": Seat(1, "second", 400, frozenset({7})), "cy": Seat(0, "first", 300)}, first_window=5)
    assert [sampler.takes_part(client, 4) for client in ("ada", "bo", "cy")] == [True, True, False]
    assert sampler.takes_part("cy", 5), "a member that comes back counts as before, a new one from then on"
    assert members.at(0) == {"ada", "cy"} and members.at(1) == {"bo"} and members.at(2) == frozenset()
    assert members.seats["bo"].session == "second"
    assert tokens == {"ada": 600, "bo": 400, "cy": 300}, "whoever holds this sees newcomers"
    assert members.has_state("bo", 7) and not members.has_state("bo", 6)
    assert not members.has_state("nobody", 7)
    members.note_states(["bo", "cy"], 9)
    assert members.has_state("bo", 7) and members.has_state("bo", 9) and members.has_state("cy", 9)
    assert not members.has_state("ada", 9)
    members.note_states(["bo"], 11)
    assert [window for window in range(20) if members.has_state("bo", window)] == [9, 11], "as the client itself"
    members.note_states(["bo"], 10)
    assert [window for window in range(20) if members.has_state("bo", window)] == [9, 10], "the run went back"


@pytest.mark.parametrize("sampler", [Turns, partial(Sample, count=2, seed=1)])
def test_a_turn_that_a_member_was_told_stays_its_own(sampler: Callable[..., Sampler]) -> None:
    """A member announces its next turn far ahead, before anybody knows of newcomers."""
    names = ["ada", "cy", "ed", "flo"]
    members = Members({name: Seat(0, "first", 100) for name in names}, sampler(dict.fromkeys(names, 0), 1))
    planned = 3
    told = {name: next_window_of(name, members.sampler.takes_part, planned, math.inf) for name in names}
    members.admit({name: Seat(0, "first", 100) for name in ("bo", "di")}, first_window=planned + 1)
    assert told == {name: next_window_of(name, members.sampler.takes_part, planned, math.inf) for name in names}
    assert any(members.sampler.takes_part("bo", window) for window in range(planned, 100))


def test_an_invitation_says_where_to_go_and_what_the_run_is() -> None:
    config = parse_config({"clients": {"reconnect_timeout": 17.0}, "cut": "rows", "run": {"windows": 9}}, "test")
    welcome = Invitation(config, ["here:1", "there:2"], b"tokens", "{}").to("ada", Seat(1, "secret", 77))
    assert (welcome.endpoint, welcome.session, welcome.reconnect_timeout) == ("there:2", "secret", 17.0)
    assert (welcome.tokenizer, welcome.model_config, welcome.cut) == (b"tokens", "{}", '"rows"')
    settings = parse_settings(welcome.settings)
    assert (settings.tokens, settings.windows) == (77, 9)


def test_a_local_client_stays_on_this_machine_and_nobody_else_is_told_its_address() -> None:
    near = {"client-00": ["127.0.0.1:1", "127.0.0.1:2"]}
    invitation = Invitation(parse_config({}, "test"), ["a-name:1", "a-name:2"], b"", "{}", local_endpoints=near)
    seat = Seat(1, "secret", 77)
    assert invitation.to("client-00", seat).endpoint == "127.0.0.1:2"
    assert invitation.to("ada", seat).endpoint == "a-name:2"
    assert invitation.to_visitor().endpoint == "a-name:1"


def asked(**changes: object) -> tuple[JoinAsked, Future[pb.Welcome]]:
    answer: Future[pb.Welcome] = Future()
    return JoinAsked(hello(**changes), answer), answer


def test_who_asks_what_a_run_is_like_gets_no_session_and_takes_no_seat() -> None:
    config = parse_config({"window": {"tokens": 900}, "aggregator": {"address": "there:5", "secret": "s"}}, "test")
    invitation = Invitation(config, ["here:1"], b"tokens", "{}", run="this")
    # Its files, its text and its name in the run are of no account.
    visit, answer = asked(inspect=True, shard_characters=0, task="", client="ada")
    assert answer_visitor(invitation, visit)
    welcome = answer.result(timeout=0)
    assert (welcome.session, welcome.aggregator_session, welcome.aggregator) == ("", "", "there:5")
    assert parse_settings(welcome.settings).tokens == 900 and welcome.tokenizer == b"tokens"


def test_a_visitor_of_another_version_is_told() -> None:
    visit, answer = asked(inspect=True, protocol=PROTOCOL + 1)
    assert answer_visitor(Invitation(parse_config({}, "test"), ["here:1"], b"", "{}"), visit)
    assert "install the same fedbert-ds on both" in str(answer.exception(timeout=0))


def test_who_joins_is_no_visitor() -> None:
    join_event, answer = asked()
    assert not answer_visitor(Invitation(parse_config({}, "test"), ["here:1"], b"", "{}"), join_event)
    assert not answer.done()


def test_visitors_leave_the_seats_to_those_who_join() -> None:
    joins = Joins(1, EXPECTATION)
    invitation = Invitation(parse_config({}, "test"), ["here:1"], b"", "{}")
    visits = [asked(inspect=True, client=f"visitor-{n}") for n in range(3)]
    events = iter([*(visit for visit, _ in visits), asked()[0]])
    fill(
        joins,
        lambda timeout: next(events),
        60.0,
        SimpleNamespace(requested=False),
        lambda: None,
        partial(answer_visitor, invitation),
    )
    assert joins.clients == ("ada",) and all(answer.result(timeout=0) for _, answer in visits)


def test_sessions_are_secrets_of_their_own() -> None:
    assert len({new_session() for _ in range(100)}) == 100
