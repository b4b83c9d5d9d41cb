"""A rank with a fake body: what honest clients get, and how windows follow one another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from unit.server.bad_clients import SOME, trio
from unit.server.fake_client import GONE, HALF, Alter, FakeClient
from unit.server.fakes import Rank, run_config

from fedbert_ds.config import RunConfig
from fedbert_ds.errors import RunError, WireError
from fedbert_ds.federation.sampler import Sampler
from fedbert_ds.federation.strategy import strategy_of_run
from fedbert_ds.server.body.device_work import DeviceWork
from fedbert_ds.server.network.events import Connected, Disconnected, Event, Received
from fedbert_ds.wire import fedbert_pb2 as pb


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


def test_parallel_halves_are_averaged_by_the_servers_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(federation={"mode": "parallel"})
    rank = Rank(monkeypatch, config, trio(config))
    rank.run()
    # Values are the lengths of names, and so are the weights that clients name, which nobody hears.
    expected = (3.0 * 6 + 2.0 * 5 + 2.0 * 6) / 17
    for client in rank.clients:
        for half in client.updates[1:]:
            torch.testing.assert_close(half["table"], torch.full(HALF["table"], expected))


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


# -- who takes part --------------------------------------------------------------------------------


def four(config: RunConfig, **alter: Alter) -> tuple[list[FakeClient], Sampler]:
    """ada, bo, cy and di, each told its first window, and who of them takes part when."""
    lengths = {"ada": (3, 5, 2, 4), "bo": (4, 3, 3, 2), "cy": (2, 2, 8, 1), "di": (7, 1)}
    strategy = strategy_of_run(config)
    sampler = strategy.sampler(config.run.seed, dict.fromkeys(lengths, 0))
    clients = [
        FakeClient(name, config, own, **({"alter": alter[name]} if name in alter else {}))
        for name, own in lengths.items()
    ]
    return clients, sampler


def in_window(clients: list[FakeClient], sampler: Sampler, window: int) -> list[FakeClient]:
    return [client for client in clients if sampler.takes_part(client.name, window)]


@pytest.mark.parametrize("order", ["arrival", "fixed"])
@pytest.mark.parametrize(
    "federation",
    [
        {"mode": "synchronous", "participants": 2},
        {"mode": "synchronous", "participants": 2, "staleness": 1},
        {"mode": "synchronous", "participants": 1},
        {"mode": "parallel", "participants": 2, "average_every": 3},
        {"mode": "sequential", "average_every": 2},
    ],
    ids=str,
)
def test_only_participants_train_and_everybody_gets_the_combined_update(
    monkeypatch: pytest.MonkeyPatch, federation: dict[str, Any], order: str
) -> None:
    """FakeClient refuses a second step of a window, and whatever is not of its own windows."""
    windows = 12
    config = run_config(
        run={"windows": windows, "save_every": 5}, federation=federation | {"bound": None}, window={"order": order},
        clients={"expected": 4},
    )  # fmt: skip
    clients, sampler = four(config)
    rank = Rank(monkeypatch, config, clients)
    assert rank.run() == windows
    assert not rank.problems
    counts = [len(in_window(clients, sampler, window)) for window in range(windows)]
    assert set(counts) == {federation.get("participants", 1)}
    for window, status in enumerate(rank.statuses):
        here = in_window(clients, sampler, window)
        assert status.tally.tokens == sum(sum(client.lengths) for client in here)
        assert status.tally.masked_tokens == sum(length // 2 for client in here for length in client.lengths)
    every = federation.get("average_every", 1)
    exchanges = [window for window in range(windows) if (window + 1) % every == 0]
    for client in clients:
        own = [window for window in range(windows) if sampler.takes_part(client.name, window)]
        assert client.missed == [window for window in range(windows) if window not in own]
        stepped = list(range(windows)) if federation["mode"] == "synchronous" else own
        assert client.windows_stepped == stepped
        assert len(client.updates) == 1 + len(exchanges)
        for window, update in zip(exchanges, client.updates[1:], strict=True):
            names = [len(other.name) for other in in_window(clients, sampler, window)]
            # Values are the lengths of names, weights the masked tokens.
            masked = [sum(length // 2 for length in other.lengths) for other in in_window(clients, sampler, window)]
            mean = sum(n * m for n, m in zip(names, masked, strict=True)) / sum(masked)
            summed = float(sum(names)), mean
            expected = summed[0] if federation["mode"] == "synchronous" else summed[1]
            torch.testing.assert_close(update["head"], torch.full((2,), expected))
    # All say where they are, participants or not.
    assert rank.engine.saved == [5, 10, 12]
    assert rank.served.checkpoints.client_figures.keys() == {client.name for client in clients}


@pytest.mark.parametrize("mode", ["synchronous", "sequential"])
def test_windows_of_a_lost_client_are_empty_and_the_run_goes_on(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """bo leaves in its first window; what it should have trained later is a gradient of zero."""
    windows = 12
    participants = {"participants": 1} if mode == "synchronous" else {}
    config = run_config(
        run={"windows": windows}, federation={"mode": mode, **participants}, clients={"expected": 4, "minimum": 1}
    )
    gone: Alter = lambda number, message: [GONE] if message.WhichOneof("body") == "activations" else [message]  # noqa: E731
    clients, sampler = four(config, bo=gone)
    rank = Rank(monkeypatch, config, clients)
    assert rank.run() == windows and len(rank.engine.steps) == windows
    assert rank.problems == ["client bo disconnected"]
    of_bo = [window for window in range(windows) if sampler.takes_part("bo", window)]
    assert len(of_bo) > 1
    for window, status in enumerate(rank.statuses):
        assert (status.tally.masked_tokens == 0) == (window in of_bo), window
        assert status.tally.forwards > 0, "a dummy keeps ranks in step"
    lost = [status.tally.lost_masked_tokens for status in rank.statuses]
    assert [window for window, masked in enumerate(lost) if masked] == of_bo[:1], "the others were not promised"
    for client in clients:
        if client.name != "bo":
            assert len(client.updates) == 1 + windows


def test_nobody_is_silent_who_waits_for_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others' turns take far longer than a client may be silent."""
    config = run_config(
        run={"windows": 16, "save_every": 4}, federation={"mode": "sequential", "average_every": 4},
        clients={"expected": 4, "silence_timeout": 300.0},
    )  # fmt: skip
    clients, _ = four(config)
    rank = Rank(monkeypatch, config, clients, latency=lambda client, event: 40.0)
    begun = rank.clock.now
    assert rank.run() == 16
    assert not rank.problems
    assert (rank.clock.now - begun) * 3 / 4 > 3 * 300.0, "so long each of them had nothing to say"


# -- the rest of the protocol ----------------------------------------------------------------------


def test_a_join_that_is_one_too_many_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config()
    rank = Rank(monkeypatch, config, trio(config))
    answer = rank.endpoint.join(FakeClient("late", config))
    gone = rank.endpoint.join(FakeClient("gone", config))
    gone.cancel()
    assert rank.run() == 2
    with pytest.raises(WireError, match=r"client late: the run has its 3 clients; raise clients\.maximum"):
        answer.result(timeout=0)


def test_a_client_that_joined_and_never_came_ends_no_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is named, and the others train on."""
    config = run_config(clients={"join_timeout": 5.0, "minimum": 2})
    rank = Rank(monkeypatch, config, trio(config), latency=lambda client, event: 1e9 if client == "bo" else 0.0)
    assert rank.run() == 2
    problem = "bo joined but opened no stream; is server.advertise reachable from there?"
    assert f"warning {problem}\n" in capsys.readouterr().out
    assert {client.name: len(client.windows_stepped) for client in rank.clients} == {"ada": 2, "bo": 0, "cy": 2}


@pytest.mark.parametrize("minimum", [1, 2])
def test_a_client_that_came_and_left_before_the_run_began_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, minimum: int
) -> None:
    """It found that it cannot take part, and said so."""
    config = run_config(clients={"join_timeout": 600.0, "minimum": minimum})

    def leaves(number: int, message: pb.ClientMessage) -> list[pb.ClientMessage]:
        return [pb.ClientMessage()]  # its connection ends

    def cy_comes_last(client: str, event: Event) -> float:
        return 30.0 if client == "cy" and isinstance(event, Connected) else 0.0

    ada, cy = FakeClient("ada", config), FakeClient("cy", config)
    rank = Rank(monkeypatch, config, [ada, FakeClient("bo", config, alter=leaves), cy], latency=cy_comes_last)
    begun = rank.clock.now
    assert rank.run() == 2
    assert rank.clock.now - begun < 600.0
    assert [len(client.windows_stepped) for client in (ada, cy)] == [2, 2]


def test_a_run_to_which_nobody_came_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(clients={"join_timeout": 5.0})
    rank = Rank(monkeypatch, config, trio(config), latency=lambda client, event: 1e9)
    with pytest.raises(RunError, match=r"^ada, bo, cy joined but opened no stream; is server\.advertise reachable"):
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
    # Two steps from 0 with the sum of gradients 3, 2 and 2; or the average of weights 3, 2 and 2,
    # by the masked tokens 6, 5 and 6.
    expected = -2 * 0.5 * 7.0 if mode == "synchronous" else 40.0 / 17
    torch.testing.assert_close(half["head"], torch.full((2,), expected))
    asked = [client for client, message in rank.endpoint.sent if message.WhichOneof("body") == "update_request"]
    assert asked == ([] if mode == "synchronous" else ["ada", "bo", "cy"])


def test_a_half_sent_before_it_is_asked_for_does_not_stand_in_for_the_one_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its client is refused, and the merged model is made of the other halves."""
    config = run_config(federation={"mode": "parallel"}, clients=SOME)
    rank = Rank(monkeypatch, config, trio(config))
    window = rank.run()
    early = pb.UpdateChunk(last=True)
    rank.endpoint.post("bo", Received("bo", pb.ClientMessage(update=early)))
    half = rank.collect(window)
    assert half.keys() == HALF.keys()
    problems = rank.served.rooms.membership.problems
    assert problems and "an update of window 0, which nobody asked for" in problems[0]


def test_what_an_earlier_process_of_a_client_left_behind_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It wrote nonsense and went, and its next process was let in before anybody looked."""
    config = run_config()
    rank = Rank(monkeypatch, config, trio(config))
    nonsense = pb.ClientMessage(update=pb.UpdateChunk(last=True))
    rank.endpoint.post("bo", Received("bo", nonsense, "session of its earlier process"))
    rank.endpoint.post("bo", Disconnected("bo", "", "session of its earlier process"))
    assert rank.run() == 2 and not rank.problems
    assert all(client.windows_stepped == [0, 1] and client.refusal is None for client in rank.clients)


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
    # Nothing else takes time here.
    assert [status.tally.seconds for status in rank.statuses] == pytest.approx(
        [wait + work for wait, work in zip(waits, busy, strict=True)]
    )
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
        "client bo is late: windows go on without it until it answers; its update of window 8 is left out"
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
