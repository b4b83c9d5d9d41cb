"""Joins of a run under way: who is let in, whose place they take, and in what order ranks act."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from unit.server.fakes import EXPECTATION, Clock, FakeRankGroup, hello_of, invitation, joined, run_config
from unit.server.test_rank_two_ranks import Board, BoardRankGroup

from fedbert_ds.errors import WireError
from fedbert_ds.federation.sampler import Everybody
from fedbert_ds.federation.strategy import strategy_of_run
from fedbert_ds.server.admission import Members, Seat
from fedbert_ds.server.contract import RankStatus, Tally
from fedbert_ds.server.network.events import JoinAbandoned
from fedbert_ds.server.newcomers import PATIENCE_SECONDS, Admissions, Newcomers, Reception, no_joins_here
from fedbert_ds.server.queue.in_flight import Demand
from fedbert_ds.wire import fedbert_pb2 as pb

NOBODY: frozenset[str] = frozenset()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("fedbert_ds.server.newcomers.time", SimpleNamespace(monotonic=made.monotonic))
    return made


def reception_of(members: Members, *, most: int = 3, mode: str = "synchronous", **federation: Any) -> Reception:
    """That of a run of two ranks."""
    config = run_config(
        window={"tokens": 1000},
        federation={"mode": mode, **federation},
        clients={"expected": len(members.seats), "maximum": most},
    )
    shard_sizes = dict.fromkeys(members.seats, 1000)
    strategy = strategy_of_run(config)
    welcoming = invitation(config, "rank-0:1", "rank-1:1")
    expectation = replace(EXPECTATION, clients_save=strategy.halves_are_personal, run="this run")
    return Reception(expectation, welcoming, members, shard_sizes, strategy)


def members_with(seats: dict[str, Seat]) -> Members:
    return Members(seats, Everybody(dict.fromkeys(seats, 0), 1))


@pytest.fixture
def members() -> Members:
    return members_with({"ada": Seat(0, "ada's first", 300), "bo": Seat(1, "bo's first", 200)})


def asks(reception: Reception, client: str, **hello: Any) -> Future[pb.Welcome]:
    event, answer = joined(hello_of(client, **hello))
    reception.hear(event)
    return answer


def refusal(answer: Future[pb.Welcome]) -> str:
    error = answer.exception(timeout=0)
    assert isinstance(error, WireError)
    return str(error)


HERE = frozenset({"ada", "bo"})


# -- what rank 0 decides ---------------------------------------------------------------------------


def test_a_new_client_gets_a_seat_where_there_is_least_to_do(clock: Clock, members: Members) -> None:
    reception = reception_of(members)
    assert not reception.is_asked
    answer = asks(reception, "cy")
    assert reception.is_asked
    admissions = reception.decide(HERE, NOBODY, clock.now)
    assert admissions.seats.keys() == {"cy"} and not admissions.evicted
    seat = admissions.seats["cy"]
    assert (seat.rank, seat.tokens) == (1, 333), "bo's rank, and its share by its text, 1 of 3"
    assert len(seat.session) == 32 and not answer.done()
    members.admit(admissions.seats, 7)
    reception.welcome(admissions)
    welcome = answer.result(timeout=0)
    assert (welcome.endpoint, welcome.session) == ("rank-1:1", seat.session)
    assert not reception.is_asked


def test_a_new_clients_share_is_that_of_one_that_takes_part(clock: Clock, members: Members) -> None:
    """Of three clients two train at a time, so each brings half a window."""
    reception = reception_of(members, participants=2)
    asks(reception, "cy")
    assert reception.decide(HERE, NOBODY, clock.now).seats["cy"].tokens == 500


def test_a_member_that_comes_back_has_its_seat_and_a_new_session(clock: Clock, members: Members) -> None:
    """Though the run has its clients: it is one of them."""
    reception = reception_of(members, most=2)
    asks(reception, "bo", shard_characters=50_000)
    admissions = reception.decide(frozenset({"ada"}), NOBODY, clock.now)
    seat = admissions.seats["bo"]
    assert (seat.rank, seat.tokens) == (1, 200) and seat.session != "bo's first"


@pytest.mark.parametrize(("mode", "keeps_states"), [("synchronous", False), ("parallel", True)])
def test_states_count_where_clients_keep_them(clock: Clock, members: Members, mode: str, keeps_states: bool) -> None:
    reception = reception_of(members, mode=mode)
    asks(reception, "bo", saved_windows=[3, 5], run="this run")
    asks(reception, "cy", saved_windows=[4], run="this run")
    asks(reception, "ada", saved_windows=[5], run="another run")
    seats = reception.decide(NOBODY, NOBODY, clock.now).seats
    members.admit(seats, 7)
    assert members.has_state("bo", 5) == members.has_state("cy", 4) == keeps_states
    assert not members.has_state("bo", 4) and not members.has_state("ada", 5) and not members.has_state("dee", 5)


def test_a_lost_connection_keeps_no_place_from_a_client_that_joins_again(clock: Clock, members: Members) -> None:
    reception = reception_of(members, most=2)
    answer = asks(reception, "bo")
    assert reception.decide(HERE, frozenset({"bo"}), clock.now) == Admissions({}, frozenset({"bo"}))
    assert not answer.done() and reception.is_asked, "it is let in next time, when the old one is gone"
    assert reception.decide(frozenset({"ada"}), NOBODY, clock.now).seats.keys() == {"bo"}


def test_who_joins_and_opens_no_stream_keeps_its_place_for_a_while(clock: Clock, members: Members) -> None:
    """Whoever comes meanwhile waits, and has it then."""
    reception = reception_of(members, most=2)
    patience = run_config().clients.join_timeout
    reception.see(frozenset({"ada"}), clock.now)
    answer = asks(reception, "cy")
    clock.now += patience - 1
    assert reception.decide(frozenset({"ada"}), NOBODY, clock.now) == Admissions({}, NOBODY)
    assert not answer.done() and reception.is_asked
    clock.now += 2
    admissions = reception.decide(frozenset({"ada"}), NOBODY, clock.now)
    assert admissions.seats.keys() == {"cy"} and admissions.seats["cy"].tokens == 500, "a share without bo's text"
    # Bo's own seat is still bo's, should it come.
    members.admit(admissions.seats, 7)
    reception.welcome(admissions)
    asks(reception, "bo")
    assert reception.decide(frozenset({"ada"}), NOBODY, clock.now).seats["bo"].rank == 1


def test_names_that_only_join_fill_no_run(clock: Clock, members: Members) -> None:
    """A caller that asks for seat after seat has as many as there are free, and no more."""
    reception = reception_of(members, most=4)
    reception.see(HERE, clock.now)
    answers = [asks(reception, f"ghost-{number}") for number in range(50)]
    admissions = reception.decide(HERE, NOBODY, clock.now)
    assert len(admissions.seats) == 2
    members.admit(admissions.seats, 7)
    reception.welcome(admissions)
    assert sum(answer.exception(timeout=0) is None for answer in answers) == 2
    more = [asks(reception, f"ghost-{number}") for number in range(50, 100)]
    assert reception.decide(HERE, NOBODY, clock.now) == Admissions({}, NOBODY)
    assert not any(answer.done() for answer in more)


def test_a_lost_client_s_place_waits_for_nobody(clock: Clock, members: Members) -> None:
    """It had opened its stream."""
    reception = reception_of(members, most=2)
    reception.see(HERE, clock.now)
    asks(reception, "cy")
    assert reception.decide(frozenset({"ada"}), NOBODY, clock.now).seats.keys() == {"cy"}


def test_a_client_that_is_here_keeps_its_place_after_a_while(clock: Clock, members: Members) -> None:
    """The process before may be dead, and the server may not know it yet."""
    reception = reception_of(members)
    answer = asks(reception, "bo")
    for seconds in (0.0, PATIENCE_SECONDS):
        assert reception.decide(HERE, NOBODY, clock.now + seconds) == Admissions({}, NOBODY)
        assert not answer.done() and reception.is_asked
    assert reception.decide(HERE, NOBODY, clock.now + PATIENCE_SECONDS + 0.1) == Admissions({}, NOBODY)
    assert refusal(answer) == "client bo is here already; end it, or give each client its own --id"
    assert not reception.is_asked


def test_no_more_clients_than_the_run_file_allows(clock: Clock, members: Members) -> None:
    reception = reception_of(members, most=3)
    answers = {name: asks(reception, name) for name in ("eve", "dee", "cy")}
    assert reception.decide(HERE, NOBODY, clock.now).seats.keys() == {"cy"}, "one place, by name"
    for name in ("dee", "eve"):
        assert refusal(answers[name]) == f"client {name}: the run has its 3 clients; raise clients.maximum"
    assert not answers["cy"].done()


def test_who_went_away_again_is_forgotten(clock: Clock, members: Members) -> None:
    reception = reception_of(members)
    event, answer = joined(hello_of("cy"))
    reception.hear(event)
    answer.cancel()
    reception.hear(JoinAbandoned(event.hello))
    assert not reception.is_asked
    assert reception.decide(HERE, NOBODY, clock.now) == Admissions({}, NOBODY)
    reception.hear(JoinAbandoned(hello_of("nobody")))


def test_who_went_away_before_it_was_welcomed_does_no_harm(clock: Clock, members: Members) -> None:
    reception = reception_of(members)
    event, answer = joined(hello_of("cy"))
    reception.hear(event)
    admissions = reception.decide(HERE, NOBODY, clock.now)
    answer.cancel()
    reception.welcome(admissions)
    reception.hear(JoinAbandoned(event.hello))
    assert not reception.is_asked


def test_two_under_one_name_are_one_client(clock: Clock, members: Members) -> None:
    reception = reception_of(members)
    first = asks(reception, "cy")
    second_event, second = joined(hello_of("cy"))
    reception.hear(second_event)
    assert refusal(second) == "client cy is joining already; give each client its own --id"
    reception.hear(JoinAbandoned(second_event.hello))
    assert reception.is_asked and not first.done(), "that the second went away is not about the first"
    assert reception.decide(HERE, NOBODY, clock.now).seats.keys() == {"cy"}


@pytest.mark.parametrize(
    ("hello", "reason"),
    [
        ({"protocol": 1}, "client cy speaks protocol 1"),
        ({"vocabulary_hash": "mine"}, "another vocabulary"),
        ({"shape_hash": "mine"}, "another model"),
        ({"cut": '"rows"'}, "insists on cut"),
        ({"shard_characters": 0}, "client cy has no text"),
    ],
)
def test_a_join_that_does_not_fit_is_answered_at_once(members: Members, hello: dict[str, Any], reason: str) -> None:
    reception = reception_of(members)
    assert reason in refusal(asks(reception, "cy", **hello))
    assert not reception.is_asked


def test_who_asks_what_the_run_is_like_is_told_and_not_let_in(clock: Clock, members: Members) -> None:
    reception = reception_of(members)
    answer = asks(reception, "cy", inspect=True)
    assert answer.result(timeout=0).session == "" and not reception.is_asked


def test_other_ranks_take_no_joins() -> None:
    event, answer = joined(hello_of("cy"))
    no_joins_here(event)
    assert refusal(answer) == "client cy: this rank takes no joins; dial the coordinator"
    no_joins_here(JoinAbandoned(event.hello))


# -- what all ranks do -----------------------------------------------------------------------------


def status(*clients: str, detached: tuple[str, ...] = (), is_asked: bool = False) -> RankStatus:
    return RankStatus(
        num_micro_batches=0, masked_tokens=0, demand=Demand(0.0, 0.0, 0.0, 1), clients=frozenset(clients),
        active=frozenset(clients), stop=False,
        problems=(), new_problems=(), tally=Tally(), detached=frozenset(detached), is_asked=is_asked,
    )  # fmt: skip


class Ranks:
    """Two ranks' newcomers in threads of their own, and what they did, in order."""

    def __init__(self, seats: dict[str, Seat], **reception: Any) -> None:
        self.members = [members_with(seats), members_with(seats)]
        self.reception = reception_of(self.members[0], **reception)
        self.done: list[str] = []
        board = Board()
        self.newcomers = [self._newcomers(rank, board) for rank in range(2)]

    def _newcomers(self, rank: int, board: Board) -> Newcomers:
        ranks = self

        class Group(BoardRankGroup):
            def barrier(self) -> None:
                ranks.done.append(f"rank {rank} waits")
                super().barrier()

        def admit(sessions: dict[str, str]) -> None:
            assert all(self.members[rank].seats[client].session == session for client, session in sessions.items())
            self.done.append(f"rank {rank} admits {'+'.join(sorted(sessions)) or 'nobody'}")

        membership: Any = SimpleNamespace(evict=lambda client: self.done.append(f"rank {rank} evicts {client}"))
        outbox: Any = SimpleNamespace(settle=lambda: self.done.append(f"rank {rank} has sent everything"))
        return Newcomers(
            self.reception if rank == 0 else None, self.members[rank], membership, outbox, admit, Group(rank, board)
        )

    def asks(self, client: str) -> Future[pb.Welcome]:
        answer = asks(self.reception, client)
        answer.add_done_callback(lambda done: self.done.append(f"{client} is welcomed"))
        return answer

    def let_in(self, *statuses: RankStatus) -> list[str]:
        threads = [threading.Thread(target=one.let_in, args=(statuses, 7), daemon=True) for one in self.newcomers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
            assert not thread.is_alive()
        done, self.done = self.done, []
        return done


def test_a_client_is_welcomed_once_its_rank_lets_it_in_and_all_ranks_know() -> None:
    ranks = Ranks({"ada": Seat(0, "a", 300), "bo": Seat(1, "b", 200)})
    answer = ranks.asks("cy")
    assert ranks.newcomers[0].is_asked and not ranks.newcomers[1].is_asked
    done = ranks.let_in(status("ada", is_asked=True), status("bo"))
    assert done[-1] == "cy is welcomed" and sorted(done[:-1]) == [
        "rank 0 admits nobody", "rank 0 waits",
        "rank 1 admits cy", "rank 1 has sent everything", "rank 1 waits",
    ]  # fmt: skip
    sent = done.index("rank 1 has sent everything")
    assert sent < done.index("rank 1 admits cy"), "nothing more may be under way to an earlier process of it"
    for rank in (0, 1):
        assert done.index(f"rank {rank} waits") > next(
            i for i, what in enumerate(done) if f"rank {rank} admits" in what
        )
    assert ranks.members[0].seats == ranks.members[1].seats
    assert ranks.members[1].at(1) == {"bo", "cy"} and ranks.members[0].tokens == {"ada": 300, "bo": 200, "cy": 333}
    assert answer.result(timeout=0).session == ranks.members[1].seats["cy"].session
    for members in ranks.members:
        assert [members.sampler.takes_part("cy", window) for window in (6, 7)] == [False, True], "on every rank alike"
    assert not ranks.newcomers[0].is_asked


def test_the_rank_of_a_lost_connection_ends_it_and_the_client_comes_in_the_next_time() -> None:
    ranks = Ranks({"ada": Seat(0, "a", 300), "bo": Seat(1, "b", 200)})
    answer = ranks.asks("bo")
    first = ranks.let_in(status("ada", is_asked=True), status("bo", detached=("bo",)))
    assert "rank 1 evicts bo" in first and "rank 0 evicts bo" not in first and not answer.done()
    second = ranks.let_in(status("ada", is_asked=True), status())
    assert second[-1] == "bo is welcomed" and "rank 1 admits bo" in second
    assert ranks.members[0].seats["bo"] == replace(ranks.members[1].seats["bo"]) != Seat(1, "b", 200)


def test_where_nobody_asks_nothing_is_decided_and_no_rank_waits(members: Members) -> None:
    class Alone(FakeRankGroup):
        def broadcast(self, from_rank_0: Any, kind: Any) -> Any:
            raise AssertionError("an exchange between ranks for nothing")

    def admit(sessions: dict[str, str]) -> None:
        raise AssertionError(sessions)

    nothing: Any = None
    newcomers = Newcomers(reception_of(members), members, nothing, nothing, admit, Alone())  # type: ignore[arg-type]
    newcomers.let_in([status("ada"), status("bo")], 7)
    assert members.seats.keys() == {"ada", "bo"}
