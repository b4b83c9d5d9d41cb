"""What a rank and an aggregator of another party tell each other, and what a loss of it means."""

from __future__ import annotations

import pytest
from unit.server.test_remote_exchange import FakeLine, delivered, made

from fedbert_ds.errors import AggregatorLost, ConnectionLost, WireError
from fedbert_ds.server.queue.deadlines import Deadlines
from fedbert_ds.server.remote_aggregator import RemoteAggregator
from fedbert_ds.server.remote_exchange import RemoteExchange
from fedbert_ds.wire import fedbert_pb2 as pb


def test_admission_waits_for_the_answer() -> None:
    line, _, _, remote = made()
    with pytest.raises(WireError, match="admitted no clients"):
        remote.admit({"ada": "s"}, timeout=0.0)
    line.reports.append(pb.Report(admitted=pb.Admitted(window=4)))
    remote.admit({"bo": "t", "ada": "s"}, timeout=5.0)
    admissions = [pb.Admission(client=c, session=s) for c, s in (("ada", "s"), ("bo", "t"))]
    assert line.orders[-1] == pb.Order(admit=pb.Admit(window=4, clients=admissions))


def test_what_was_said_of_a_client_before_it_came_back_is_forgotten() -> None:
    line, _, exchange, remote = made()
    line.reports += [
        pb.Report(lost=pb.Lost(client="ada", reason="gone")),
        pb.Report(lost=pb.Lost(client="bo", reason="gone, too", may_return=True)),
        pb.Report(admitted=pb.Admitted(window=4)),
    ]
    remote.admit({"ada": "new"}, timeout=5.0)
    [(client, error)] = exchange.take_unsound()
    assert client == "bo" and isinstance(error, ConnectionLost)
    remote.begin("ada", 3, with_reference=False)
    assert line.orders[-1] == pb.Order(begin=pb.BeginClient(client="ada", reference=False, attempt=3))


def test_a_save_and_the_result_are_waited_for() -> None:
    line, _, exchange, remote = made()
    attended = []

    def attend() -> None:
        attended.append(exchange.is_combining)
        line.reports.append(pb.Report(saved=pb.SavedReference(window=6)))
        line.reports.append(pb.Report(concluded=pb.Concluded(file="there")))
        exchange.take_unsound()

    remote.save(6, attend)
    remote.conclude(7, complete=True, masked={"ada": 5})
    assert remote.await_result(attend) == "there"
    remote.commit(7, 0.5)
    remote.finish("done", complete=True)
    assert attended == [True] and line.kinds() == ["save", "conclude", "commit", "finish"]


def test_windows_are_undone_when_the_aggregator_says_so() -> None:
    line, _, exchange, remote = made()
    waited = []

    def attend() -> None:
        waited.append(exchange.is_combining)
        if len(waited) == 3:
            line.reports += [pb.Report(undone=pb.Undone(attempt=2))]
        exchange.take_unsound()

    remote.undo(3, 2, attend)
    assert line.orders == [pb.Order(undo=pb.Undo(window=3, attempt=2))]
    assert waited == [True] * 3 and not exchange.is_combining


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


def lost() -> tuple[LostLine, RemoteExchange, RemoteAggregator]:
    """With ada and bo here, whose updates of window 3 are awaited."""
    line = LostLine()
    remote = RemoteAggregator(line)
    exchange = RemoteExchange(remote, Deadlines())
    for client in ("ada", "bo", "cy"):
        line.reports.append(pb.Report(admitted=pb.Admitted()))
        remote.admit({client: "s"}, timeout=5.0)
    remote.part_with("cy")
    exchange.expect(3, dict.fromkeys(["ada", "bo"], 1), average=False)
    line.is_lost = True
    return line, exchange, remote


def test_with_the_aggregator_all_its_clients_are_lost_and_nothing_is_awaited() -> None:
    line, exchange, remote = lost()
    line.reports.append(delivered(3, "ada"))  # said before it was lost
    assert exchange.poll() is None
    assert remote.lost == "the aggregator is lost: no answer"
    gone = exchange.take_unsound()
    assert [client for client, _ in gone] == ["ada", "bo"] and exchange.take_unsound() == []
    assert all(isinstance(error, ConnectionLost) for _, error in gone), "they may join again"
    assert exchange.is_idle and exchange.is_done(9) and not exchange.is_combining and not exchange.awaited(3)
    said = len(line.orders)
    remote.undo(3, 1, lambda: None)
    exchange.forget("ada")
    assert len(line.orders) == said, "what was said to a run that is over must not count in the next"
    remote.give_up("another rank says so, too")
    assert remote.lost == "the aggregator is lost: no answer" and exchange.take_unsound() == []


def test_a_loss_that_another_rank_has_seen_counts_here() -> None:
    line, exchange, remote = lost()
    line.is_lost = False
    line.reports.append(pb.Report(combined=pb.Combined(window=3)))
    remote.give_up("rank 1 has lost it")
    assert [client for client, _ in exchange.take_unsound()] == ["ada", "bo"]
    assert exchange.poll() is None and exchange.is_idle, "what comes after that is of a run that is over"


@pytest.mark.parametrize("what", ["save", "undo", "admit", "result"])
def test_who_waits_for_a_lost_aggregator_waits_no_more(what: str) -> None:
    _, exchange, remote = lost()

    def attend() -> None:
        exchange.poll()

    match what:
        case "save":
            assert not remote.save(3, attend), "it does not count"
        case "undo":
            remote.undo(3, 1, attend)
        case "admit":
            remote.admit({"dee": "s"}, timeout=60.0)
        case "result":
            with pytest.raises(AggregatorLost, match="no answer; start it and this run again, both with --resume"):
                remote.await_result(attend)
    assert remote.lost and not exchange.is_combining


def test_a_save_that_was_made_before_does_not_stand_for_one_that_is_lost() -> None:
    line, _, exchange, remote = made()
    line.reports.append(pb.Report(saved=pb.SavedReference(window=6)))
    assert remote.save(6, exchange.poll)
    line.take = LostLine.take.__get__(line)  # type: ignore[method-assign]
    line.is_lost = True  # type: ignore[attr-defined]
    assert not remote.save(6, exchange.poll)


def test_an_aggregator_that_is_back_begins_where_the_run_goes_on() -> None:
    line, exchange, remote = lost()
    exchange.poll()
    exchange.take_unsound()
    remote.reopen(b"opened", 2)
    assert line.reopened == [(b"opened", 2)] and remote.lost == ""
    line.reports.append(pb.Report(admitted=pb.Admitted(window=2)))
    remote.admit({"ada": "new"}, timeout=5.0)
    assert line.orders[-1].admit.window == 2
    exchange.expect(2, dict.fromkeys(["ada"], 1), average=False)
    line.reports.append(pb.Report(combined=pb.Combined(window=2, norm=1.0)))
    assert exchange.poll() == (2, {})
