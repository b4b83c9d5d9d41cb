"""A rank's books about updates that another party combines: the same answers as of its own."""

from __future__ import annotations

from collections import deque

import pytest

from fedbert_ds.errors import WireError
from fedbert_ds.server.queue.deadlines import Deadlines, Question
from fedbert_ds.server.remote_aggregator import RemoteAggregator
from fedbert_ds.server.remote_exchange import RemoteExchange
from fedbert_ds.wire import fedbert_pb2 as pb


class FakeLine:
    def __init__(self) -> None:
        self.orders: list[pb.Order] = []
        self.reports: deque[pb.Report] = deque()

    def send(self, order: pb.Order) -> None:
        self.orders.append(order)

    def take(self, timeout: float = 0.0) -> pb.Report | None:
        return self.reports.popleft() if self.reports else None

    def kinds(self) -> list[str | None]:
        return [order.WhichOneof("body") for order in self.orders]


def made() -> tuple[FakeLine, Deadlines, RemoteExchange, RemoteAggregator]:
    line, deadlines = FakeLine(), Deadlines()
    remote = RemoteAggregator(line, first_window=4)
    return line, deadlines, RemoteExchange(remote, deadlines), remote


def delivered(window: int, client: str, whole: bool = True) -> pb.Report:
    return pb.Report(delivered=pb.Delivered(window=window, client=client, whole=whole))


def test_a_window_is_done_when_the_aggregator_says_so() -> None:
    line, _, exchange, _ = made()
    assert exchange.is_idle and not exchange.is_combining and exchange.is_done(9)
    exchange.expect(3, {"bo": 5, "ada": 4}, average=False)
    assert line.orders == [pb.Order(expect=pb.Expect(window=3, clients=["ada", "bo"], masked=[4, 5]))]
    assert exchange.awaited(3) == {"ada", "bo"} and exchange.awaited(4) == frozenset()
    assert exchange.is_combining and exchange.is_done(3) and not exchange.is_done(4) and exchange.poll() is None
    line.reports += [delivered(3, "ada"), delivered(3, "bo", whole=False)]
    assert exchange.poll() is None and exchange.awaited(3) == {"bo"}
    line.reports += [pb.Report(combined=pb.Combined(window=3, norm=0.5))] * 2
    assert exchange.poll() == (3, {}) and exchange.norms == {3: 0.5}
    assert exchange.poll() is None and exchange.is_idle and exchange.is_done(4)


def test_an_update_at_the_aggregator_answers_the_ranks_question() -> None:
    line, deadlines, exchange, _ = made()
    exchange.expect(0, dict.fromkeys(["ada"], 1), average=True)
    question = Question("update", 0)
    deadlines.ask("ada", question, 5.0)
    line.reports.append(delivered(0, "ada", whole=False))
    exchange.poll()
    assert deadlines.asked_at("ada", question) == 5.0
    line.reports.append(delivered(0, "ada"))
    exchange.poll()
    assert deadlines.asked_at("ada", question) is None


def test_a_client_that_is_late_or_gone_is_dropped_elsewhere_too() -> None:
    line, _, exchange, remote = made()
    exchange.expect(0, dict.fromkeys(["ada", "bo"], 1), average=True)
    line.reports.append(delivered(0, "bo"))
    exchange.poll()
    assert exchange.forget("ada") == [0] and exchange.forget("bo") == []
    remote.part_with("ada")
    drops = [pb.Drop(client="ada"), pb.Drop(client="bo"), pb.Drop(client="ada", gone=True)]
    assert [order.drop for order in line.orders[1:]] == drops


def test_clients_that_the_aggregator_parted_with_are_told_once() -> None:
    line, _, exchange, _ = made()
    line.reports.append(pb.Report(lost=pb.Lost(client="ada", reason="nonsense")))
    [(client, error)] = exchange.take_unsound()
    assert client == "ada" and isinstance(error, WireError) and str(error) == "nonsense"
    assert exchange.take_unsound() == []


def test_an_update_that_comes_here_is_refused() -> None:
    with pytest.raises(WireError, match="client ada: its update of window 2 belongs to the aggregator"):
        made()[2].deliver(2, "ada", dict)
