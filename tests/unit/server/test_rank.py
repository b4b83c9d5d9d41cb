"""A rank with a fake body: what honest clients get, and that one bad client harms itself alone."""

from __future__ import annotations

import math
import struct
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from unit.server.fake_client import GONE, HALF, WIDTH, Alter, FakeClient
from unit.server.fakes import Clock, FakeEndpoint, FakeEngine, InlineThread, Rank, Served, joined, run_config, seats

from fedbert_ds.config import RunConfig
from fedbert_ds.errors import RunError, WireError
from fedbert_ds.server.body.device_work import DeviceWork
from fedbert_ds.server.contract import RankStatus
from fedbert_ds.server.network.events import Event, Received
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.codecs import encode

SOME = {"minimum": 1}


def trio(config: RunConfig, alter: Alter | None = None) -> list[FakeClient]:
    """ada and cy are honest and share micro-batches with bo, whom `alter` may spoil."""
    ada, cy = FakeClient("ada", config, (3, 5, 2, 4)), FakeClient("cy", config, (2, 2, 8, 1))
    return [ada, FakeClient("bo", config, (4, 3, 3, 2), *([alter] if alter else [])), cy]


@pytest.mark.parametrize("cut", ["embeddings", "rows"])
@pytest.mark.parametrize("order", ["arrival", "fixed"])
@pytest.mark.parametrize("lockstep_forwards", [False, True])
def test_honest_clients_get_their_own_numbers_back(
    monkeypatch: pytest.MonkeyPatch, cut: Any, order: str, lockstep_forwards: bool
) -> None:
    """FakeClient compares every hidden state and input gradient; here it is counted that all of
    them came.
    """
    config = run_config(cut=cut, window={"order": order})
    rank = Rank(monkeypatch, config, trio(config), lockstep_forwards=lockstep_forwards)
    assert rank.run() == 2
    tokens = sum(sum(client.lengths) for client in rank.clients)
    masked = {client.name: sum(length // 2 for length in client.lengths) for client in rank.clients}
    assert rank.engine.tokens == 2 * tokens
    # What each client divides its loss by: the masked tokens of everybody's window.
    told = {message.hidden.masked_tokens for _, message in rank.endpoint.sent if message.HasField("hidden")}
    assert told == {sum(masked.values())}
    assert len(rank.engine.steps) == 2 and rank.engine.saved == [2]
    assert [is_last for _, is_last in rank.engine.backwards].count(True) == 2
    for client in rank.clients:
        assert client.windows_stepped == [0, 1]
        assert client.hidden_states == 2 * masked[client.name]
        assert client.refusal is None
    for status in rank.statuses:
        tally = status.tally
        assert (tally.tokens, tally.masked_tokens, tally.lost_masked_tokens) == (tokens, sum(masked.values()), 0)
        assert tally.loss_sum == 2.0 * sum(masked.values())
        assert tally.dummy_micro_batches == 0
    assert not rank.problems


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_frames_are_coded_as_the_run_file_says(monkeypatch: pytest.MonkeyPatch, codec: str) -> None:
    config = run_config(wire={"activations": codec, "gradients": "fp32"}, run={"windows": 1})
    rank = Rank(monkeypatch, config, trio(config))
    rank.run()
    assert [client.codecs for client in rank.clients] == [{codec}] * 3


def test_synchronous_halves_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config()
    rank = Rank(monkeypatch, config, trio(config))
    rank.run()
    for client in rank.clients:
        first, *summed = client.updates
        assert not any(tensor.any() for tensor in first.values()), "the initial half"
        assert len(summed) == 2
        for half in summed:
            for name, shape in HALF.items():
                assert torch.equal(half[name], torch.full(shape, 3.0 + 2.0 + 2.0))


def test_parallel_halves_are_averaged_by_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(federation={"mode": "parallel"})
    rank = Rank(monkeypatch, config, trio(config))
    rank.run()
    expected = (3.0 * 3 + 2.0 * 2 + 2.0 * 2) / 7  # values and weights are the lengths of names
    for client in rank.clients:
        for half in client.updates[1:]:
            torch.testing.assert_close(half["table"], torch.full(HALF["table"], expected))


# -- one bad client --------------------------------------------------------------------------------


def instead(kind: str, change: Any, which: int = 0) -> Alter:
    """Spoil the which-th message of a kind."""
    seen = [0]

    def alter(number: int, message: pb.ClientMessage) -> list[pb.ClientMessage]:
        if message.WhichOneof("body") != kind:
            return [message]
        seen[0] += 1
        return change(message) if seen[0] == which + 1 else [message]

    return alter


def with_frame(kind: str, field: str, **changes: Any) -> Alter:
    def change(message: pb.ClientMessage) -> list[pb.ClientMessage]:
        frame = getattr(getattr(message, kind), field)
        for name, value in changes.items():
            if name == "shape":
                frame.ClearField("shape")
                frame.shape.extend(value)
            elif name == "first":
                frame.payload = struct.pack("<f", value) + frame.payload[4:]
            else:
                setattr(frame, name, value)
        return [message]

    return instead(kind, change)


def with_field(kind: str, name: str, value: Any) -> Alter:
    def change(message: pb.ClientMessage) -> list[pb.ClientMessage]:
        body = getattr(message, kind)
        body.ClearField(name)
        if isinstance(value, list):
            getattr(body, name).extend(value)
        else:
            setattr(body, name, value)
        return [message]

    return instead(kind, change)


def beside(kind: str, *others: pb.ClientMessage) -> Alter:
    return instead(kind, lambda message: [*others, message])


def twice(kind: str) -> Alter:
    return instead(kind, lambda message: [message, message])


GRADIENT_TOO_EARLY = pb.ClientMessage(
    gradient=pb.Gradient(window=0, micro_batch=1, hidden=encode(torch.zeros(1, WIDTH), "fp32"))
)

BAD: dict[str, tuple[Callable[[], Alter], str]] = {
    "activations of another shape": (
        lambda: with_frame("activations", "values", shape=[3, WIDTH]),
        "shape [3, 4] instead of",
    ),
    "activations of another width": (
        lambda: with_frame("activations", "values", shape=[4, 5]),
        "shape [4, 5] instead of",
    ),
    "activations cut short": (lambda: with_frame("activations", "values", payload=b"xxxx"), "4 bytes instead of"),
    "activations in another codec": (
        lambda: with_frame("activations", "values", codec="int8"),
        "codec 'int8' instead of",
    ),
    "activations that are not finite": (lambda: with_frame("activations", "values", first=math.nan), "not finite"),
    "activations out of all measure": (lambda: with_frame("activations", "values", first=1e9), "a value of 1e+09"),
    "activations of another window": (lambda: with_field("activations", "window", 1), "of window 1 instead of 0"),
    "gradient of another window": (lambda: with_field("gradient", "window", 1), "of window 1 instead of 0"),
    "activations twice": (lambda: twice("activations"), "which nobody asked for"),
    "activations of no micro-batch": (lambda: with_field("activations", "micro_batch", 77), "which nobody asked for"),
    "positions out of range": (lambda: with_field("activations", "masked_positions", bytes([255])), "masked positions"),
    "gradient that is not finite": (lambda: with_frame("gradient", "hidden", first=-math.inf), "not finite"),
    "gradient out of all measure": (lambda: with_frame("gradient", "hidden", first=-1e9), "a value of 1e+09"),
    "gradient of another shape": (lambda: with_frame("gradient", "hidden", shape=[1]), "shape [1] instead of"),
    "gradient twice": (lambda: twice("gradient"), "which nobody asked for"),
    "gradient before hidden states": (lambda: beside("activations", GRADIENT_TOO_EARLY), "which nobody asked for"),
    "a loss that is no number": (lambda: with_field("gradient", "loss_sum", math.nan), "a loss of nan"),
    "a loss below zero": (lambda: with_field("gradient", "loss_sum", -1.0), "a loss of -1.0"),
    "an infinite loss": (lambda: with_field("gradient", "loss_sum", math.inf), "a loss of inf"),
    "manifest twice": (lambda: twice("manifest"), "a second manifest of window 0"),
    "manifest of another window": (lambda: with_field("manifest", "window", 1), "manifest of window 1 instead of 0"),
    "manifest above its share": (
        lambda: with_field("manifest", "lengths", [8, 8, 8, 8]),
        "32 tokens instead of at most 12",
    ),
    "manifest of nothing": (lambda: with_field("manifest", "lengths", []), "0 lengths"),
    "manifest of a long sequence": (lambda: with_field("manifest", "lengths", [9, 1, 1, 1]), "a sequence of 9 tokens"),
    "half of another name": (lambda: with_field("update", "name", "tables"), "tensor 'tables' of shape"),
    "half of another shape": (lambda: with_field("update", "shape", [4, 3]), "tensor 'table' of shape [4, 3]"),
    "half that is not finite": (
        lambda: with_field("update", "payload", struct.pack("<12f", *[math.nan] * 12)),
        "holds nan",
    ),
    "half before it is asked for": (
        lambda: beside("manifest", pb.ClientMessage(update=pb.UpdateChunk(last=True, weight=1.0))),
        "did not arrive whole",
    ),
    "half without end": (
        lambda: beside("update", pb.ClientMessage(update=pb.UpdateChunk(last=True, weight=1.0))),
        "not arrive whole",
    ),
    "a weight that is no number": (
        lambda: beside("update", pb.ClientMessage(update=pb.UpdateChunk(last=True, weight=math.nan))),
        "a weight of nan",
    ),
    "saved without being asked": (
        lambda: beside("gradient", pb.ClientMessage(saved=pb.Saved(window=0))),
        "not asked to save",
    ),
    "attach again": (lambda: beside("gradient", pb.ClientMessage(attach=pb.Attach(client="ada"))), "kind attach"),
}


@pytest.mark.parametrize("fault", BAD)
def test_one_bad_client_is_refused_alone(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    make_alter, reason = BAD[fault]
    config = run_config(clients=SOME)
    rank = Rank(monkeypatch, config, trio(config, make_alter()))
    assert rank.run() == 2
    ada, bo, cy = rank.clients
    for honest in (ada, cy):
        assert honest.windows_stepped == [0, 1] and honest.refusal is None
        assert honest.hidden_states == 2 * sum(length // 2 for length in honest.lengths)
    assert bo.refusal is not None and reason in bo.refusal and "client bo" in bo.refusal
    assert "\n" not in bo.refusal
    assert rank.problems == [bo.refusal], "the run says so too, once"
    assert rank.endpoint.revoked == {"bo"}


def with_rows(num_rows: int, index: bytes | None = None) -> Alter:
    """Another number of distinct rows than there are, or another row index."""

    def change(message: pb.ClientMessage) -> list[pb.ClientMessage]:
        activations = message.activations
        activations.values.CopyFrom(encode(torch.zeros(num_rows, WIDTH), "fp32"))
        if index is not None:
            activations.row_index = index
        return [message]

    return instead("activations", change)


BAD_ROWS: dict[str, tuple[Callable[[], Alter], str]] = {
    "no rows": (lambda: with_rows(0), "0 rows for 7 tokens"),
    "more rows than tokens": (lambda: with_rows(8), "8 rows for 7 tokens"),
    "rows without a shape": (lambda: with_frame("activations", "values", shape=[]), "0 rows for 7 tokens"),
    "an index below no row": (lambda: with_rows(3, bytes([255] * 2)), "a row number is not below 3"),
    "an index of another length": (lambda: with_rows(3, bytes(3)), "3 bytes of row numbers instead of 2"),
    "no index": (lambda: with_rows(3, b""), "0 bytes of row numbers instead of 2"),
    "rows of another width": (
        lambda: with_frame("activations", "values", shape=[4, WIDTH + 1]),
        "shape [4, 5] instead of [4, 4]",
    ),
}


@pytest.mark.parametrize("fault", BAD_ROWS)
def test_bad_rows_are_refused_alone(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    make_alter, reason = BAD_ROWS[fault]
    config = run_config(cut="rows", clients=SOME)
    rank = Rank(monkeypatch, config, trio(config, make_alter()))
    assert rank.run() == 2
    ada, bo, cy = rank.clients
    assert ada.windows_stepped == cy.windows_stepped == [0, 1]
    assert bo.refusal is not None and bo.refusal.endswith(reason)


def test_the_lost_share_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """bo is refused at its first gradient: all its masked tokens are missing from window 0, none
    from window 1.
    """
    config = run_config(clients=SOME)
    rank = Rank(monkeypatch, config, trio(config, BAD["gradient that is not finite"][0]()))
    rank.run()
    assert [status.tally.lost_masked_tokens for status in rank.statuses] == [2 + 1 + 1 + 1, 0]


def test_without_a_minimum_one_bad_client_ends_the_run_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config()
    rank = Rank(monkeypatch, config, trio(config, BAD["gradient out of all measure"][0]()))
    with pytest.raises(RunError) as caught:
        rank.run()
    assert str(caught.value).startswith("client bo: gradient of micro-batch")
    assert "2 of 3 clients left, the run needs 3 (clients.minimum); nothing was saved yet" in str(caught.value)


@pytest.mark.parametrize("federation", [{"mode": "synchronous"}, {"mode": "parallel"}], ids=lambda f: f["mode"])
@pytest.mark.parametrize("after", range(40))
def test_a_client_may_leave_after_any_message(
    monkeypatch: pytest.MonkeyPatch, after: int, federation: dict[str, Any]
) -> None:
    config = run_config(clients=SOME, federation=federation, run={"save_every": 1})
    rank = Rank(monkeypatch, config, trio(config, lambda number, message: [message if number < after else GONE]))
    assert rank.run() == 2
    ada, _, cy = rank.clients
    assert ada.windows_stepped == cy.windows_stepped == [0, 1]
    assert {"ada", "cy"} <= rank.server.clients


@pytest.mark.parametrize("after", range(0, 40, 3))
def test_a_client_may_fall_silent_after_any_message(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    config = run_config(clients=SOME, run={"save_every": 1})
    rank = Rank(monkeypatch, config, trio(config, lambda number, message: [message] if number < after else []))
    assert rank.run() == 2
    ada, bo, cy = rank.clients
    assert ada.windows_stepped == cy.windows_stepped == [0, 1]
    if bo.refusal is not None:
        assert bo.refusal == "client bo was silent for 300 s (clients.silence_timeout)"
        assert rank.endpoint.revoked == {"bo"}
    assert ada.refusal is None and cy.refusal is None


# -- nobody is blamed for the rank's own time ------------------------------------------------------


def test_time_in_collectives_is_not_a_clients_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """With ZeRO 3 a forward may wait for another rank's slow client, longer than a client may be
    silent.
    """
    config = run_config()
    rank = Rank(
        monkeypatch, config, trio(config), latency=lambda client, event: 0.1,
        seconds_of_work=400.0, lockstep_forwards=True,
    )  # fmt: skip
    assert rank.run() == 2
    assert not rank.problems


def test_a_large_half_over_a_slow_link_is_not_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each chunk of bo's half takes 250 s, so all of it takes longer than anybody may be silent,
    and others wait.
    """

    def latency(client: str, event: Event) -> float:
        is_half = isinstance(event, Received) and event.message.WhichOneof("body") == "update"
        return 250.0 if client == "bo" and is_half else 0.0

    config = run_config()
    rank = Rank(monkeypatch, config, trio(config), latency=latency)
    assert rank.run() == 2
    assert not rank.problems


# -- two ranks -------------------------------------------------------------------------------------


class Board:
    """Where two ranks meet: each writes something, waits for the other, and reads both."""

    def __init__(self) -> None:
        self._written: list[Any] = [None, None]
        self._barrier = threading.Barrier(2, timeout=20.0)

    def meet(self, rank: int, mine: Any) -> list[Any]:
        self._written[rank] = mine
        self._barrier.wait()
        both = list(self._written)
        self._barrier.wait()
        return both

    def leave(self) -> None:
        """The other rank must not wait for one that has failed."""
        self._barrier.abort()


class BoardRankGroup:
    """Stands for torch.distributed between two threads."""

    world_size, group, update_group = 2, None, None

    def __init__(self, rank: int, board: Board) -> None:
        self.rank = rank
        self._board = board

    def gather(self, mine: Any) -> list[Any]:
        return self._board.meet(self.rank, mine)

    def barrier(self) -> None:
        self.gather(None)


SECONDS_OF_WORK = 1000.0
"""Of each forward and backward; so long that what steps really take does not matter."""


class CollectiveEngine(FakeEngine):
    """Every backward and step needs the other rank; so do forwards with `lockstep_forwards`."""

    def __init__(self, rank: int, board: Board, lockstep_forwards: bool) -> None:
        super().__init__(seconds=SECONDS_OF_WORK, lockstep_forwards=lockstep_forwards)
        self._rank, self._board = rank, board

    def forward(self, micro_batch: int, body_input: Any) -> torch.Tensor:
        if self.lockstep_forwards:
            self._together("forward")
        return super().forward(micro_batch, body_input)

    def backward(self, micro_batch: int, hidden_gradient: torch.Tensor, is_last: bool) -> torch.Tensor:
        self._together(("backward", is_last))
        return super().backward(micro_batch, hidden_gradient, is_last)

    def step(self, learning_rate: float, client_norm: float = 0.0) -> float:
        # Not the norm: updates of these ranks are combined apart.
        self._together(("step", learning_rate))
        return super().step(learning_rate, client_norm)

    def _together(self, what: Any) -> None:
        both = self._board.meet(self._rank, what)
        assert both[0] == both[1], f"ranks disagree about a collective: {both}"


@pytest.mark.parametrize("fault", [None, "activations twice", "gradient that is not finite", "manifest of nothing"])
@pytest.mark.parametrize("order", ["arrival", "fixed"])
@pytest.mark.parametrize("lockstep_forwards", [False, True])
def test_two_ranks_keep_step_whoever_fails(
    monkeypatch: pytest.MonkeyPatch, fault: str | None, order: str, lockstep_forwards: bool
) -> None:
    """Rank 1 has one client, with less text than rank 0's two, and loses it: it goes on with
    dummies alone.
    """
    monkeypatch.setattr("fedbert_ds.server.network.outbox.ThreadPoolExecutor", InlineThread)
    config = run_config(clients={"minimum": 1}, window={"order": order}, run={"windows": 3, "save_every": 2})
    ada, bo = FakeClient("ada", config), FakeClient("bo", config, (2, 2, 8, 1))
    cy = FakeClient("cy", config, (3, 4), *([BAD[fault][0]()] if fault else []))
    by_rank = [[ada, bo], [cy]]
    places = {
        client.name: replace(seat, rank=number)
        for number, clients in enumerate(by_rank)
        for client, seat in zip(clients, seats(clients).values(), strict=True)
    }
    board, outcomes = Board(), [None, None]
    tallies: list[RankStatus] = []
    engines = [CollectiveEngine(number, board, lockstep_forwards) for number in range(2)]

    def serve(number: int) -> None:
        try:
            endpoint = FakeEndpoint(Clock(), by_rank[number], lambda client, event: 0.0)
            served = Served(config, engines[number], endpoint, BoardRankGroup(number, board), places)
            outcomes[number] = served.train(tallies)
        except BaseException as error:
            outcomes[number] = error
            board.leave()

    threads = [threading.Thread(target=serve, args=(number,), daemon=True) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert outcomes == [3, 3]
    assert engines[0].saved == engines[1].saved == [2, 3]
    assert len(engines[0].backwards) == len(engines[1].backwards)
    for client in (ada, bo) if fault else (ada, bo, cy):
        assert client.windows_stepped == [0, 1, 2]
        assert client.hidden_states == 3 * sum(length // 2 for length in client.lengths)
    assert (cy.refusal is not None) == (fault is not None)
    assert any(status.tally.dummy_micro_batches for status in tallies)
    for tally in (status.tally for status in tallies):
        # A dummy keeps the device busy, forward and backward, and is no work.
        work = tally.forwards + tally.backwards - 2 * tally.dummy_micro_batches
        assert round(tally.busy_seconds / SECONDS_OF_WORK) == work


# -- the rest of the protocol ----------------------------------------------------------------------


def test_a_join_that_comes_too_late_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config()
    rank = Rank(monkeypatch, config, trio(config))
    event, answer = joined(pb.Hello(client="late"))
    gone_event, gone = joined(pb.Hello(client="gone"))
    gone.cancel()
    rank.endpoint.post("late", event)
    rank.endpoint.post("gone", gone_event)
    assert rank.run() == 2
    with pytest.raises(WireError, match="client late: this rank takes no joins"):
        answer.result(timeout=0)


def test_a_client_that_joined_and_never_came_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(clients={"join_timeout": 5.0})
    rank = Rank(monkeypatch, config, trio(config), latency=lambda client, event: 10.0 if client == "bo" else 0.0)
    with pytest.raises(RunError, match=r"^bo joined but opened no stream; is server\.advertise reachable from there\?"):
        rank.run()


def test_a_stop_saves_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(run={"windows": 50})
    rank = Rank(monkeypatch, config, trio(config))
    step = rank.engine.step

    def stop_at_the_third(learning_rate: float, client_norm: float) -> float:
        scale = step(learning_rate, client_norm)
        rank.stop.requested = len(rank.engine.steps) == 3
        return scale

    monkeypatch.setattr(rank.engine, "step", stop_at_the_third)
    assert rank.run() == 3
    assert rank.engine.saved == [3]
    assert {client.name: len(client.windows_stepped) for client in rank.clients} == {"ada": 3, "bo": 3, "cy": 3}
    rank.served.rooms.service.finish("stopped", complete=False)
    assert all(client.finish is not None and client.finish.reason == "stopped" for client in rank.clients)


def test_checkpoints_come_when_due(monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(run={"windows": 5, "save_every": 2})
    rank = Rank(monkeypatch, config, trio(config))
    assert rank.run() == 5
    assert rank.engine.saved == [2, 4, 5]
    assert {name: saved.flops_per_token for name, saved in rank.served.checkpoints.client_figures.items()} == {
        "ada": 7.0, "bo": 7.0, "cy": 7.0,
    }  # fmt: skip


@pytest.mark.parametrize("mode", ["synchronous", "parallel"])
def test_the_half_to_hand_over(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """Synchronous halves are the reference, so no client is asked; parallel ones are averaged."""
    steps = {"name": "sgd", "lr": 0.5, "schedule": "constant", "weight_decay": 0.0}
    config = run_config(federation={"mode": mode}, optimizer=steps)
    rank = Rank(monkeypatch, config, trio(config))
    window = rank.run()
    half = rank.collect(window)
    assert {name: tuple(tensor.shape) for name, tensor in half.items()} == HALF
    # Two steps from 0 with the sum of gradients 3, 2 and 2; or the average of weights 3, 2 and 2.
    expected = -2 * 0.5 * 7.0 if mode == "synchronous" else 7.0 / 3
    torch.testing.assert_close(half["head"], torch.full((2,), expected))
    asked = [client for client, message in rank.endpoint.sent if message.WhichOneof("body") == "update_request"]
    assert asked == ([] if mode == "synchronous" else ["ada", "bo", "cy"])


def test_a_half_sent_before_it_is_asked_for_does_not_stand_in_for_the_one_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is incomplete, and the merged model is made of the other halves."""
    config = run_config(federation={"mode": "parallel"}, clients=SOME)
    rank = Rank(monkeypatch, config, trio(config))
    window = rank.run()
    early = pb.UpdateChunk(last=True, weight=5.0)
    rank.endpoint.post("bo", Received("bo", pb.ClientMessage(update=early)))
    half = rank.collect(window)
    assert half.keys() == HALF.keys()
    problems = rank.served.rooms.membership.problems
    assert problems and "did not arrive whole" in problems[0]


# -- windows one after another ---------------------------------------------------------------------


def test_the_next_windows_activations_are_here_before_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """With many clients and answers that take long, the body does not wait between windows (halves:
    parallel mode).
    """
    windows = 6
    config = run_config(
        run={"windows": windows},
        window={"micro_batches_in_flight": 8},
        federation={"mode": "parallel", "average_every": 1000},
        clients={"expected": 24},
    )
    clients = [FakeClient(f"c{number:02}", config, (8, 8)) for number in range(24)]
    rank = Rank(monkeypatch, config, clients, latency=lambda client, event: 0.3, seconds_of_work=0.1)
    assert rank.run() == windows
    assert all(client.windows_stepped == list(range(windows)) for client in clients)
    waits = [status.tally.wait_seconds for status in rank.statuses]
    busy = [status.tally.busy_seconds for status in rank.statuses]
    assert min(busy) == pytest.approx(2 * 48 * 0.1)
    # The first window begins with nothing; later ones find activations that came while the one
    # before ended.
    assert waits[0] > 0.3
    assert max(waits[1:]) < 0.05 * busy[0], waits


@pytest.mark.parametrize("mode", ["synchronous", "parallel"])
def test_a_late_client_is_suspended_and_comes_back(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """bo stalls once; windows go on without it, and when it is back it takes part again."""
    windows = 30
    config = run_config(run={"windows": windows}, federation={"mode": mode})
    stalls = [2000.0]

    def latency(client: str, event: Event) -> float:
        is_answer = isinstance(event, Received) and event.message.WhichOneof("body") == "gradient"
        stalled = client == "bo" and is_answer and event.message.gradient.window == 8 and bool(stalls)
        return 150.0 if stalled and stalls.pop() else 1.0

    rank = Rank(monkeypatch, config, trio(config), latency=latency)
    assert rank.run() == windows
    ada, bo, cy = rank.clients
    assert rank.problems == [
        "client bo is late: windows go on without it until it answers; its half of window 8 is left out"
    ]
    assert bo.refusal is None and 8 in bo.skipped
    for client in (ada, cy):
        assert client.windows_stepped == list(range(windows)) and not client.missed
    lost = [status.tally.lost_masked_tokens for status in rank.statuses]
    assert lost[8] > 0 and sum(lost) == lost[8], "what is not planned is not lost"
    tokens = [status.tally.tokens for status in rank.statuses]
    assert tokens[-1] == max(tokens) == sum(sum(client.lengths) for client in rank.clients), "bo is back at the end"
    assert min(tokens) == sum(ada.lengths) + sum(cy.lengths)
    assert len(rank.engine.steps) == windows


@pytest.mark.parametrize("mode", ["synchronous", "parallel"])
def test_a_half_that_does_not_come_costs_its_client_alone(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    config = run_config(clients=SOME, federation={"mode": mode}, run={"windows": 3})
    alter: Alter = lambda number, message: [] if message.WhichOneof("body") == "update" else [message]  # noqa: E731
    rank = Rank(monkeypatch, config, trio(config, alter))
    assert rank.run() == 3
    ada, bo, cy = rank.clients
    assert bo.refusal == "client bo was silent for 300 s (clients.silence_timeout)"
    assert rank.problems == [bo.refusal]
    assert ada.windows_stepped == cy.windows_stepped == [0, 1, 2]
    assert sum(status.tally.lost_masked_tokens for status in rank.statuses) == 0


def test_with_staleness_the_next_window_does_not_wait_for_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """bo's half takes 20 s of every window; with staleness 1 the next one runs meanwhile."""

    def seconds(staleness: int) -> float:
        config = run_config(run={"windows": 6}, federation={"mode": "parallel", "staleness": staleness})

        def latency(client: str, event: Event) -> float:
            is_half = isinstance(event, Received) and event.message.WhichOneof("body") == "update"
            return 20.0 if client == "cy" and is_half and event.message.update.last else 0.0

        rank = Rank(monkeypatch, config, trio(config), latency=latency, seconds_of_work=1.0)
        begun = rank.clock.now
        assert rank.run() == 6
        assert all(client.windows_stepped == list(range(6)) for client in rank.clients)
        return rank.clock.now - begun

    assert seconds(0) > 6 * 20.0
    assert seconds(1) < seconds(0) - 20.0


class Slow(DeviceWork):
    """A device that is done with a result only after it has been asked several times, or waited
    for.
    """

    def __init__(self, tensor: torch.Tensor, seconds: float) -> None:
        super().__init__(tensor, seconds)
        self._asked = 0

    @property
    def is_done(self) -> bool:
        self._asked += 1
        return self._asked > 3


@pytest.mark.parametrize("order", ["arrival", "fixed"])
def test_results_that_are_still_being_made_hold_up_nobody(monkeypatch: pytest.MonkeyPatch, order: str) -> None:
    """Sent when they are there, all of them before the step, and none twice: FakeClient checks what
    it gets.
    """
    config = run_config(window={"order": order, "micro_batches_in_flight": 3})
    rank = Rank(monkeypatch, config, trio(config), seconds_of_work=0.5, device_work=Slow)
    assert rank.run() == 2
    for client in rank.clients:
        assert client.hidden_states == 2 * sum(length // 2 for length in client.lengths)
    for status in rank.statuses:
        assert status.tally.busy_seconds == 0.5 * (status.tally.forwards + status.tally.backwards)
    assert not rank.problems
