"""A rank's books about updates that another party combines: the same answers as of its own."""

from __future__ import annotations

from collections import deque

import pytest

from fedbert_ds.errors import AggregatorLost, ConnectionLost, WireError
from fedbert_ds.federation.client_update import ClientUpdate
from fedbert_ds.server.queue.deadlines import Deadlines, Question
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


def made() -> tuple[FakeLine, Deadlines, RemoteExchange]:
    line, deadlines = FakeLine(), Deadlines()
    return line, deadlines, RemoteExchange(line, deadlines, first_window=4)


def delivered(window: int, client: str, whole: bool = True) -> pb.Report:
    return pb.Report(delivered=pb.Delivered(window=window, client=client, whole=whole))


def test_a_window_is_done_when_the_aggregator_says_so() -> None:
    line, _, exchange = made()
    assert exchange.is_idle and not exchange.is_combining and exchange.is_done(9)
    exchange.expect(3, ["bo", "ada"], average=False)
    assert line.orders == [pb.Order(expect=pb.Expect(window=3, clients=["ada", "bo"]))]
    assert exchange.awaited(3) == {"ada", "bo"} and exchange.awaited(4) == frozenset()
    assert exchange.is_combining and exchange.is_done(3) and not exchange.is_done(4) and exchange.poll() is None
    line.reports += [delivered(3, "ada"), delivered(3, "bo", whole=False)]
    assert exchange.poll() is None and exchange.awaited(3) == {"bo"}
    line.reports += [pb.Report(combined=pb.Combined(window=3, norm=0.5))] * 2
    assert exchange.poll() == (3, {}) and exchange.norms == {3: 0.5}
    assert exchange.poll() is None and exchange.is_idle and exchange.is_done(4)


def test_an_update_at_the_aggregator_answers_the_ranks_question() -> None:
    line, deadlines, exchange = made()
    exchange.expect(0, ["ada"], average=True)
    question = Question("update", 0)
    deadlines.ask("ada", question, 5.0)
    line.reports.append(delivered(0, "ada", whole=False))
    exchange.poll()
    assert deadlines.asked_at("ada", question) == 5.0
    line.reports.append(delivered(0, "ada"))
    exchange.poll()
    assert deadlines.asked_at("ada", question) is None


def test_a_client_that_is_late_or_gone_is_dropped_elsewhere_too() -> None:
    line, _, exchange = made()
    exchange.expect(0, ["ada", "bo"], average=True)
    line.reports.append(delivered(0, "bo"))
    exchange.poll()
    assert exchange.forget("ada") == [0] and exchange.forget("bo") == []
    exchange.part_with("ada")
    drops = [pb.Drop(client="ada"), pb.Drop(client="bo"), pb.Drop(client="ada", gone=True)]
    assert [order.drop for order in line.orders[1:]] == drops


def test_clients_that_the_aggregator_parted_with_are_told_once() -> None:
    line, _, exchange = made()
    line.reports.append(pb.Report(lost=pb.Lost(client="ada", reason="nonsense")))
    [(client, error)] = exchange.take_unsound()
    assert client == "ada" and isinstance(error, WireError) and str(error) == "nonsense"
    assert exchange.take_unsound() == []


def test_an_update_that_comes_here_is_refused() -> None:
    with pytest.raises(WireError, match="client ada: its update of window 2 belongs to the aggregator"):
        made()[2].deliver(2, "ada", lambda: ClientUpdate({}, 1.0))


def test_admission_waits_for_the_answer() -> None:
    line, _, exchange = made()
    with pytest.raises(WireError, match="admitted no clients"):
        exchange.admit({"ada": "s"}, timeout=0.0)
    line.reports.append(pb.Report(admitted=pb.Admitted(window=4)))
    exchange.admit({"bo": "t", "ada": "s"}, timeout=5.0)
    admissions = [pb.Admission(client=c, session=s) for c, s in (("ada", "s"), ("bo", "t"))]
    assert line.orders[-1] == pb.Order(admit=pb.Admit(window=4, clients=admissions))


def test_what_was_said_of_a_client_before_it_came_back_is_forgotten() -> None:
    line, _, exchange = made()
    line.reports += [
        pb.Report(lost=pb.Lost(client="ada", reason="gone")),
        pb.Report(lost=pb.Lost(client="bo", reason="gone, too", may_return=True)),
        pb.Report(admitted=pb.Admitted(window=4)),
    ]
    exchange.admit({"ada": "new"}, timeout=5.0)
    [(client, error)] = exchange.take_unsound()
    assert client == "bo" and isinstance(error, ConnectionLost)
    exchange.begin("ada", 3, with_reference=False)
    assert line.orders[-1] == pb.Order(begin=pb.BeginClient(client="ada", reference=False, attempt=3))


def test_a_save_and_the_result_are_waited_for() -> None:
    line, _, exchange = made()
    attended = []

    def attend() -> None:
        attended.append(exchange.is_combining)
        line.reports.append(pb.Report(saved=pb.SavedReference(window=6)))
        line.reports.append(pb.Report(concluded=pb.Concluded(file="there")))
        exchange.take_unsound()

    exchange.save(6, attend)
    exchange.conclude(7, complete=True)
    assert exchange.await_result(attend) == "there"
    exchange.commit(7, 0.5)
    exchange.finish("done", complete=True)
    assert attended == [True] and line.kinds() == ["save", "conclude", "commit", "finish"]


def test_windows_are_undone_when_the_aggregator_says_so() -> None:
    line, _, exchange = made()
    exchange.norms[3] = 0.5
    waited = []

    def attend() -> None:
        waited.append(exchange.is_combining)
        if len(waited) == 3:
            line.reports += [pb.Report(undone=pb.Undone(attempt=2))]
        exchange.take_unsound()

    exchange.undo(3, 2, attend)
    assert line.orders == [pb.Order(undo=pb.Undo(window=3, attempt=2))]
    assert waited == [True] * 3 and exchange.norms == {} and not exchange.is_combining


# -- a lost aggregator -----------------------------------------------------------------------------


class LostLine(FakeLine):
    """Says nothing more, once it has said what there was."""

    def __init__(self) -> None:
        super().__init__()
        self.is_lost = False
        self.reopened: list[tuple[bytes, int]] = []

    def take(self, timeout: float = 0.0) -> pb.Report | None:
        if self.is_lost and not self.reports:
            raise AggregatorLost("the aggregator is lost: no answer")
        return super().take(timeout)

    def reopen(self, opened: bytes, window: int) -> None:
        self.reopened.append((opened, window))
        self.is_lost = False


def lost() -> tuple[LostLine, RemoteExchange]:
    """With ada and bo here, whose updates of window 3 are awaited."""
    line = LostLine()
    exchange = RemoteExchange(line, Deadlines())
    for client in ("ada", "bo", "cy"):
        line.reports.append(pb.Report(admitted=pb.Admitted()))
        exchange.admit({client: "s"}, timeout=5.0)
    exchange.part_with("cy")
    exchange.expect(3, ["ada", "bo"], average=False)
    line.is_lost = True
    return line, exchange


def test_with_the_aggregator_all_its_clients_are_lost_and_nothing_is_awaited() -> None:
    line, exchange = lost()
    line.reports.append(delivered(3, "ada"))  # said before it was lost
    assert exchange.poll() is None
    assert exchange.lost == "the aggregator is lost: no answer"
    gone = exchange.take_unsound()
    assert [client for client, _ in gone] == ["ada", "bo"] and exchange.take_unsound() == []
    assert all(isinstance(error, ConnectionLost) for _, error in gone), "they may join again"
    assert exchange.is_idle and exchange.is_done(9) and not exchange.is_combining and not exchange.awaited(3)
    said = len(line.orders)
    exchange.undo(3, 1, lambda: None)
    exchange.forget("ada")
    assert len(line.orders) == said, "what was said to a run that is over must not count in the next"
    exchange.give_up("another rank says so, too")
    assert exchange.lost == "the aggregator is lost: no answer" and exchange.take_unsound() == []


def test_a_loss_that_another_rank_has_seen_counts_here() -> None:
    line, exchange = lost()
    line.is_lost = False
    line.reports.append(pb.Report(combined=pb.Combined(window=3)))
    exchange.give_up("rank 1 has lost it")
    assert [client for client, _ in exchange.take_unsound()] == ["ada", "bo"]
    assert exchange.poll() is None and exchange.is_idle, "what comes after that is of a run that is over"


@pytest.mark.parametrize("what", ["save", "undo", "admit", "result"])
def test_who_waits_for_a_lost_aggregator_waits_no_more(what: str) -> None:
    _, exchange = lost()

    def attend() -> None:
        exchange.poll()

    match what:
        case "save":
            assert not exchange.save(3, attend), "it does not count"
        case "undo":
            exchange.undo(3, 1, attend)
        case "admit":
            exchange.admit({"dee": "s"}, timeout=60.0)
        case "result":
            with pytest.raises(AggregatorLost, match="no answer; start it and this run again, both with --resume"):
                exchange.await_result(attend)
    assert exchange.lost and not exchange.is_combining


def test_a_save_that_was_made_before_does_not_stand_for_one_that_is_lost() -> None:
    line, _, exchange = made()
    line.reports.append(pb.Report(saved=pb.SavedReference(window=6)))
    assert exchange.save(6, exchange.poll)
    line.take = LostLine.take.__get__(line)  # type: ignore[method-assign]
    line.is_lost = True  # type: ignore[attr-defined]
    assert not exchange.save(6, exchange.poll)


def test_an_aggregator_that_is_back_begins_where_the_run_goes_on() -> None:
    line, exchange = lost()
    exchange.poll()
    exchange.take_unsound()
    exchange.reopen(b"opened", 2)
    assert line.reopened == [(b"opened", 2)] and exchange.lost == ""
    line.reports.append(pb.Report(admitted=pb.Admitted(window=2)))
    exchange.admit({"ada": "new"}, timeout=5.0)
    assert line.orders[-1].admit.window == 2
    exchange.expect(2, ["ada"], average=False)
    line.reports.append(pb.Report(combined=pb.Combined(window=2, norm=1.0)))
    assert exchange.poll() == (2, {})
