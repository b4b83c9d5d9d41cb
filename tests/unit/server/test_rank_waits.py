"""A rank whose clients go and come: windows are undone, awaited clients come back, others join."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from unit.server.bad_clients import BAD, trio
from unit.server.fake_client import GONE, Alter, FakeClient
from unit.server.fakes import Rank, run_config

from fedbert_ds.config import RunConfig
from fedbert_ds.errors import RunError, WireError
from fedbert_ds.server.network.events import Detached, Event, Received
from fedbert_ds.wire import fedbert_pb2 as pb

STEPS = {"name": "sgd", "lr": 0.5, "schedule": "constant", "weight_decay": 0.0}


def config_with(mode: str = "synchronous", on_loss: str = "wait", **sections: Any) -> RunConfig:
    clients = {"on_loss": on_loss, "join_timeout": 60.0} | sections.pop("clients", {})
    run = {"windows": 4, "save_every": 2} | sections.pop("run", {})
    return run_config(federation={"mode": mode}, clients=clients, run=run, optimizer=STEPS, **sections)


def leaves_after(number: int) -> Alter:
    return lambda count, message: [message if count < number else GONE]


def returning(rank: Rank, config: RunConfig, seconds: float = 5.0) -> Callable[[str], None]:
    """Whoever is gone joins again as another process with the same state folder."""

    def join(name: str) -> None:
        before = rank.endpoint.clients[name]
        fresh = FakeClient(name, config, before.lengths)
        fresh.states = before.states
        rank.endpoint.join(fresh, seconds, saved_windows=sorted(before.states)[-2:])

    return join


def manifests(rank: Rank, name: str, *earlier: FakeClient) -> dict[int, tuple[Any, ...]]:
    """The last manifest of each window that a client sent, apart from the attempt."""
    sent = [m for client in (*earlier, rank.endpoint.clients[name]) for m in client.manifests]
    return {m.window: (list(m.lengths), list(m.masked), m.cursor.position) for m in sent}


def reported(rank: Rank) -> list[tuple[int, int, float, int]]:
    """What the metrics of each window say, in order."""
    tallies = [status.tally for status in rank.statuses]
    return [(tally.tokens, tally.masked_tokens, tally.loss_sum, tally.lost_masked_tokens) for tally in tallies]


def equal_references(one: Rank, other: Rank) -> bool:
    ours, theirs = (rank.served.aggregator.reference() for rank in (one, other))
    assert ours.version == theirs.version
    return all(torch.equal(ours.weights[name], tensor) for name, tensor in theirs.weights.items())


@pytest.mark.parametrize("after", range(0, 44, 2))
@pytest.mark.parametrize("order", ["arrival", "fixed"])
def test_a_run_that_waits_ends_as_if_nobody_had_been_lost(
    monkeypatch: pytest.MonkeyPatch, after: int, order: str
) -> None:
    """bo is lost after any message and comes back: the same windows, each counted once."""
    config = config_with(window={"order": order})
    undisturbed = Rank(monkeypatch, config, trio(config))
    assert undisturbed.run() == 4
    rank = Rank(monkeypatch, config, trio(config, leaves_after(after)))
    lost = rank.clients[1]
    rank.endpoint.on_gone = returning(rank, config)
    assert rank.run() == 4
    assert len(rank.engine.steps) == 4 and rank.engine.steps == undisturbed.engine.steps
    assert reported(rank) == reported(undisturbed)
    assert equal_references(rank, undisturbed)
    assert rank.served.rooms.cursors.committed == undisturbed.served.rooms.cursors.committed
    assert rank.served.rooms.inbox.is_empty, "of windows that were undone nothing is left"
    for name in ("ada", "bo", "cy"):
        assert manifests(rank, name, *[lost] * (name == "bo")) == manifests(undisturbed, name)
    for client in (rank.clients[0], rank.clients[2]):
        assert client.windows_stepped == [0, 1, 2, 3], "the half took each step once"
    if rank.served.rolled_back:
        (window,) = rank.served.rolled_back
        begins = [begin for begin in rank.clients[0].begins if begin.attempt]
        assert [(b.attempt, b.window, b.next_window, b.reference) for b in begins] == [(1, window, window, False)]
        assert rank.endpoint.clients["bo"].begins[-1].next_window == window


def test_why_a_run_waits_is_told_before_its_first_window_too(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_with()
    rank = Rank(monkeypatch, config, trio(config, leaves_after(3)))
    rank.endpoint.on_gone = returning(rank, config)
    told: list[str] = []
    rank.served.connect()
    rank.server.train(
        lambda window, _: told.append(f"window {window}"),
        rank.served.checkpoints,
        on_wait=lambda statuses: told.extend(problem for status in statuses for problem in status.new_problems),
    )
    assert told[0].startswith("client bo disconnected") and told[1:] == [f"window {window}" for window in range(4)]


def test_a_window_that_is_undone_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_with()
    refused = BAD["half that is not finite"][0]()  # the very last that it sends in a window
    rank = Rank(monkeypatch, config, trio(config, refused))
    seen: list[Any] = []
    drop = rank.engine.drop_gradients

    def drop_gradients() -> None:
        reference = rank.served.aggregator.reference()
        seen.append((reference.version, len(rank.engine.steps), any(t.any() for t in reference.weights.values())))
        drop()

    monkeypatch.setattr(rank.engine, "drop_gradients", drop_gradients)
    with pytest.raises(RunError, match="holds nan"):
        rank.run()
    assert seen == [(0, 0, False)] and rank.engine.dropped[0] > 0 and not rank.engine.steps
    assert rank.served.rolled_back == [0] and not rank.statuses, "nothing to report"
    assert rank.served.rooms.cursors.committed == {}
    assert not any(client.windows_stepped for client in rank.clients)


@pytest.mark.parametrize("after", range(0, 40, 3))
def test_where_halves_are_personal_a_run_goes_back_to_what_everybody_saved(
    monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    config = config_with("parallel")
    undisturbed = Rank(monkeypatch, config, trio(config))
    assert undisturbed.run() == 4
    assert undisturbed.engine.saved == [0, 2, 4], "a state to go back to comes first"
    rank = Rank(monkeypatch, config, trio(config, leaves_after(after)))
    lost = rank.clients[1]
    rank.endpoint.on_gone = returning(rank, config)
    assert rank.run() == 4
    assert equal_references(rank, undisturbed)
    assert rank.served.rooms.cursors.committed == undisturbed.served.rooms.cursors.committed
    assert rank.served.rooms.inbox.is_empty, "of windows that were undone nothing is left"
    for name in ("ada", "bo", "cy"):
        assert manifests(rank, name, *[lost] * (name == "bo")) == manifests(undisturbed, name)
    if not rank.served.rolled_back:
        return
    (window,) = rank.served.rolled_back
    assert window in (0, 2)
    # Lost before anything was saved: whoever has no state of window 0 begins with the reference.
    is_saved = rank.engine.loaded == [window]
    assert is_saved or (window == 0 and rank.engine.loaded == [])
    (begin,) = (begin for begin in rank.clients[0].begins if begin.attempt)
    again = rank.endpoint.clients["bo"].begins[-1]
    for one in (begin, again):
        assert (one.attempt, one.window, one.next_window) == (1, window, window)
        assert not (is_saved and one.reference)
    assert is_saved or again.reference or 0 in rank.endpoint.clients["bo"].states


def test_without_its_folder_a_personal_client_begins_with_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_with("parallel")
    rank = Rank(monkeypatch, config, trio(config, leaves_after(25)))
    lengths = rank.clients[1].lengths
    rank.endpoint.on_gone = lambda name: rank.endpoint.join(FakeClient(name, config, lengths), 5.0) and None
    assert rank.run() == 4
    (window,) = rank.served.rolled_back
    (begin,) = rank.endpoint.clients["bo"].begins
    assert (begin.window, begin.next_window, begin.reference) == (window, window, True)


# -- waiting ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["synchronous", "parallel"])
def test_a_client_that_does_not_come_back_ends_the_run_in_one_line(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    config = config_with(mode, run={"save_every": 1})
    rank = Rank(monkeypatch, config, trio(config, leaves_after(25)))
    begun = rank.clock.now
    with pytest.raises(RunError) as caught:
        rank.run()
    message = str(caught.value)
    assert message.startswith(
        "client bo disconnected; 2 of 3 clients left, the run needs 3 (clients.minimum); saved up"
    )
    assert "\n" not in message and 60.0 < rank.clock.now - begun < 80.0, "clients.join_timeout"
    saved = rank.engine.saved[-1]
    assert f"saved up to window {saved}: start the clients again and add --resume" in message


def test_below_the_minimum_a_run_saves_and_waits_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_with(on_loss="continue", clients={"minimum": 3}, run={"windows": 6, "save_every": 100})
    rank = Rank(monkeypatch, config, trio(config, leaves_after(15)))
    saved_when_it_came: list[list[int]] = []

    def join_again(name: str) -> None:
        answer = rank.endpoint.join(FakeClient(name, config, rank.clients[1].lengths), 30.0)
        answer.add_done_callback(lambda _: saved_when_it_came.append(list(rank.engine.saved)))

    rank.endpoint.on_gone = join_again
    assert rank.run() == 6
    assert saved_when_it_came == [rank.engine.saved[:1]] and len(rank.engine.saved) == 2, "saved before it waited"
    assert not rank.served.rolled_back and not rank.engine.dropped, "the window of the loss counts"
    assert len(rank.engine.steps) == 6
    assert rank.endpoint.clients["bo"].windows_stepped[-1] == 5


def test_a_minimum_that_is_not_reached_in_time_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_with(on_loss="continue", clients={"minimum": 3})
    rank = Rank(monkeypatch, config, trio(config, leaves_after(0)))
    with pytest.raises(RunError, match=r"2 of 3 clients left, the run needs 3 \(clients\.minimum\)"):
        rank.run()


@pytest.mark.parametrize("after", [0, 25])
@pytest.mark.parametrize("mode", ["synchronous", "parallel"])
def test_a_stop_ends_the_waiting_and_what_counts_is_saved(
    monkeypatch: pytest.MonkeyPatch, mode: str, after: int
) -> None:
    config = config_with(mode, run={"save_every": 100})
    rank = Rank(monkeypatch, config, trio(config, leaves_after(after)))
    next_event = rank.endpoint.next_event

    def stop_after_a_while(timeout: float) -> Event | None:
        rank.stop.requested = rank.clock.now > 1030.0
        return next_event(timeout)

    monkeypatch.setattr(rank.endpoint, "next_event", stop_after_a_while)
    window = rank.run()
    assert 1030.0 < rank.clock.now < 1060.0
    if after == 0:
        assert window == 0 and rank.engine.saved == []
    else:
        assert rank.engine.saved[-1] == window == len(rank.engine.steps) * (mode == "synchronous")


def test_answers_to_an_undone_window_are_ignored_however_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """cy hears of the roll-back only after it has sent everything of the window that was undone."""
    config = config_with()
    rank = Rank(
        monkeypatch, config, trio(config, leaves_after(9)),
        latency=lambda client, event: 20.0 if client == "cy" and isinstance(event, Received) else 0.0,
    )  # fmt: skip
    rank.endpoint.on_gone = returning(rank, config)
    assert rank.run() == 4
    assert rank.served.rolled_back and all(client.refusal is None for client in rank.clients)


# -- others join -----------------------------------------------------------------------------------


@pytest.mark.parametrize("on_loss", ["continue", "wait"])
@pytest.mark.parametrize("mode", ["synchronous", "parallel"])
def test_a_client_joins_a_run_under_way(monkeypatch: pytest.MonkeyPatch, mode: str, on_loss: str) -> None:
    config = config_with(mode, on_loss, clients={"maximum": 4}, run={"windows": 8})
    rank = Rank(monkeypatch, config, trio(config), latency=lambda client, event: 0.1)
    dee = FakeClient("dee", config, (2, 2))
    answer = rank.endpoint.join(dee, 3.0)
    assert rank.run() == 8
    assert answer.result(timeout=0).endpoint == "here:1"
    first = dee.begins[0].next_window
    assert 0 < dee.begins[0].window <= first < 8 and dee.begins[0].reference
    # Unless the run waits for it, windows may go on until its first manifest is here.
    assert set(dee.windows_stepped) >= set(range(first + 1, 8)), "and from then on it takes part"
    assert reported(rank)[-1][0] == sum(sum(client.lengths) for client in (*rank.clients, dee))
    assert "dee" in rank.server.clients and rank.served.rooms.cursors.committed["dee"]["position"] > 0
    assert not rank.served.rolled_back


def test_a_client_that_joined_late_is_awaited_like_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_with(clients={"maximum": 4}, run={"windows": 8})
    rank = Rank(monkeypatch, config, trio(config), latency=lambda client, event: 0.1)
    rank.endpoint.on_gone = returning(rank, config)
    rank.endpoint.join(FakeClient("dee", config, (2, 2), leaves_after(9)), 3.0)
    assert rank.run() == 8
    (window,) = rank.served.rolled_back
    assert rank.endpoint.clients["dee"].windows_stepped == list(range(window, 8))
    assert not any(lost for *_, lost in reported(rank))


def test_one_that_joined_after_the_last_checkpoint_goes_back_to_it_with_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has no state of that window; its half is the reference then."""
    config = config_with("parallel", clients={"maximum": 4}, run={"windows": 8, "save_every": 100})
    rank = Rank(monkeypatch, config, trio(config, leaves_after(40)), latency=lambda client, event: 0.1)
    rank.endpoint.on_gone = returning(rank, config)
    dee = FakeClient("dee", config, (2, 2))
    rank.endpoint.join(dee, 1.0)
    assert rank.run() == 8
    assert rank.served.rolled_back == [0]
    assert [(begin.window, begin.reference) for begin in dee.begins][-1] == (0, True)


@pytest.mark.parametrize("mode", ["synchronous", "parallel"])
def test_a_client_that_is_lost_while_the_state_is_saved(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """Where its state is needed the checkpoint does not count, and the run goes back further."""
    silent = [True]

    def alter(number: int, message: pb.ClientMessage) -> list[pb.ClientMessage]:
        is_second = message.HasField("saved") and message.saved.window == 2
        return [] if is_second and silent and silent.pop() else [message]

    config = config_with(mode)
    undisturbed = Rank(monkeypatch, config, trio(config))
    undisturbed.run()
    rank = Rank(monkeypatch, config, trio(config, alter))
    close, again = rank.endpoint.close, returning(rank, config)

    def close_and_join(client: str, last: pb.ServerMessage) -> None:
        close(client, last)
        if last.HasField("refused"):
            assert rank.endpoint.clients[client].may_return
            again(client)

    monkeypatch.setattr(rank.endpoint, "close", close_and_join)
    assert rank.run() == 4
    assert rank.served.rolled_back == ([2] if mode == "synchronous" else [0])
    assert equal_references(rank, undisturbed)
    assert rank.served.rooms.cursors.committed == undisturbed.served.rooms.cursors.committed


def test_a_member_whose_connection_is_lost_loses_its_place_to_its_next_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = config_with(on_loss="continue", clients={"minimum": 1}, run={"windows": 8})
    after = FakeClient("bo", config, (4, 3, 3, 2))

    def alter(number: int, message: pb.ClientMessage) -> list[pb.ClientMessage]:
        if number == 30:
            rank.endpoint.post("bo", Detached("bo"))
            rank.endpoint.join(after, 1.0)
        return [message]

    rank = Rank(monkeypatch, config, trio(config, alter), latency=lambda client, event: 0.1)
    before = rank.clients[1]
    assert rank.run() == 8
    assert before.refusal == "client bo disconnected, and joins again"
    assert after.windows_stepped and after.windows_stepped[-1] == 7
    (begin,) = after.begins
    assert begin.reference and begin.cursor.position > 0, "its text goes on where it was"


def test_a_namesake_of_a_client_that_is_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_with(on_loss="continue", run={"windows": 40})
    rank = Rank(monkeypatch, config, trio(config), latency=lambda client, event: 0.5)
    answer = rank.endpoint.join(FakeClient("bo", config), 1.0)
    assert rank.run() == 40
    with pytest.raises(WireError, match="client bo is here already; end it, or give each client its own --id"):
        answer.result(timeout=0)
