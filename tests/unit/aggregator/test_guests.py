"""Who is admitted to a run at the aggregator, and whose client is whose."""

from __future__ import annotations

import pytest

from fedbert_ds.aggregator.guests import Beginning, Guests
from fedbert_ds.errors import WireError
from fedbert_ds.federation.client_update import ClientUpdate
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.aggregation import rank_name

FROM_REFERENCE = Beginning(0, None)


class FakeEndpoint:
    def __init__(self) -> None:
        self.sessions: dict[str, str] = {}
        self.reports: list[tuple[str, pb.Report]] = []

    def admit(self, sessions: dict[str, str]) -> None:
        self.sessions = sessions

    def report(self, rank: str, report: pb.Report) -> None:
        self.reports.append((rank, report))

    def close_rank(self, rank: str, last: pb.Report) -> None:
        self.reports.append((rank, last))

    def send(self, client: str, message: pb.ServerMessage) -> None:
        raise AssertionError("guests send no messages to clients")

    def close(self, client: str, last: pb.ServerMessage) -> None:
        raise AssertionError("guests send no messages to clients")

    def take_bytes(self) -> tuple[int, int]:
        return 0, 0


def admission(client: str) -> pb.Admission:
    return pb.Admission(client=client, session=f"of {client}")


def made() -> tuple[FakeEndpoint, Guests]:
    endpoint = FakeEndpoint()
    guests = Guests(endpoint, ["zero", "one"])
    guests.admit(1, pb.Admit(window=3, clients=[admission("bo"), admission("ada")]))
    guests.admit(0, pb.Admit(window=3, clients=[admission("cy")]))
    return endpoint, guests


def test_a_rank_hears_that_its_clients_may_come() -> None:
    endpoint, guests = made()
    assert endpoint.sessions == {rank_name(0): "zero", rank_name(1): "one"} | {
        c: f"of {c}" for c in ("ada", "bo", "cy")
    }
    admitted = pb.Report(admitted=pb.Admitted(window=3))
    assert endpoint.reports == [(rank_name(1), admitted), (rank_name(0), admitted)]
    assert guests.rank(rank_name(1)) == 1 and guests.rank(rank_name(2)) is None and guests.rank("ada") is None


def test_a_client_begins_once_it_is_here_and_its_rank_says_so() -> None:
    _, guests = made()
    guests.let_begin("bo", FROM_REFERENCE)
    assert guests.take_beginnings() == {} and guests.under_way == set()
    for client in ("bo", "ada", "nobody"):
        guests.connect(client)
    assert guests.connected == {"ada", "bo"}
    guests.let_begin("nobody", FROM_REFERENCE)
    assert guests.take_beginnings() == {"bo": FROM_REFERENCE} and guests.under_way == {"bo"}
    guests.let_begin("ada", Beginning(2, 3))
    assert guests.take_beginnings() == {"ada": Beginning(2, 3)} and guests.take_beginnings() == {}
    assert guests.under_way == {"ada", "bo"}


def test_a_client_that_comes_back_begins_anew() -> None:
    endpoint, guests = made()
    guests.connect("bo")
    guests.let_begin("bo", FROM_REFERENCE)
    guests.take_beginnings()
    guests.part_with("bo")
    assert guests.under_way == set() and guests.connected == set()
    guests.admit(1, pb.Admit(window=9, clients=[pb.Admission(client="bo", session="another")]))
    assert endpoint.sessions["bo"] == "another" and guests.here == {"ada", "bo", "cy"}
    guests.connect("bo")
    assert guests.take_beginnings() == {}, "its rank has not said so"
    guests.let_begin("bo", FROM_REFERENCE)
    assert guests.take_beginnings() == {"bo": FROM_REFERENCE}


def test_who_is_gone_does_not_come_back_but_its_updates_have_their_rank() -> None:
    endpoint, guests = made()
    guests.part_with("bo")
    assert "bo" not in endpoint.sessions and guests.here == {"ada", "cy"}
    guests.connect("bo")
    assert guests.connected == set()
    updates = {client: ClientUpdate({}, weight) for weight, client in enumerate(("cy", "bo", "ada"))}
    assert [[update.weight for update in rank] for rank in guests.by_rank(updates)] == [[0], [2, 1]]
    guests.tell_rank_of("bo", pb.Report(lost=pb.Lost(client="bo")))
    assert endpoint.reports[-1][0] == rank_name(1)


@pytest.mark.parametrize("name", ["", rank_name(0), "n" * 101, "two\nlines"])
def test_no_client_has_an_impossible_name(name: str) -> None:
    with pytest.raises(WireError, match="rank 0 admits a client without a name"):
        made()[1].admit(0, pb.Admit(clients=[admission(name)]))
