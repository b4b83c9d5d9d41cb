"""One run at the aggregator, without a network: orders that do not fit, and windows in order."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from unit.aggregator.test_guests import FakeEndpoint, admission

from fedbert_ds.aggregator.folder import AggregatorFolder
from fedbert_ds.aggregator.run import AggregatedRun, ClientModel
from fedbert_ds.errors import WireError
from fedbert_ds.federation.client_update import UpdateAssembler, update_chunks
from fedbert_ds.federation.reference import from_bytes
from fedbert_ds.run_file import parse_config
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.aggregation import rank_name

SHAPES = {"table": (2, 2)}
RANKS = [rank_name(0), rank_name(1)]


class Endpoint(FakeEndpoint):
    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, pb.ServerMessage]] = []

    def send(self, client: str, message: pb.ServerMessage) -> None:
        self.sent.append((client, message))

    def close(self, client: str, last: pb.ServerMessage) -> None:
        self.sent.append((client, last))


class Run:
    """A run of two ranks; ada is rank 0's, bo is rank 1's."""

    def __init__(self, folder: Path, **federation: Any) -> None:
        self.endpoint = Endpoint()
        tree = {"federation": federation, "optimizer": {"name": "sgd", "gradient_clipping": 0.0}}
        model = ClientModel({"table": torch.zeros(2, 2)}, SHAPES, SHAPES, None)
        config = parse_config(tree, "test")
        self.real = AggregatedRun(config, model, ["zero", "one"], self.endpoint, AggregatorFolder(folder))
        for rank, client in enumerate(("ada", "bo")):
            self.real.order(RANKS[rank], pb.Order(admit=pb.Admit(clients=[admission(client)])))
            self.begin(rank, client)

    def begin(self, rank: int, client: str, reference: bool = True, attempt: int = 0) -> None:
        """Both streams of an admitted client are open, and its rank lets it begin."""
        self.real.connected(client)
        begin = pb.BeginClient(client=client, reference=reference, attempt=attempt)
        self.real.order(RANKS[rank], pb.Order(begin=begin))

    def expect(self, window: int, average: bool = False, without: str | None = None) -> None:
        for rank, client in zip(RANKS, ("ada", "bo"), strict=True):
            clients = [client] if client != without else []
            self.real.order(
                rank,
                pb.Order(expect=pb.Expect(window=window, average=average, clients=clients, masked=[1] * len(clients))),
            )

    def update(self, client: str, window: int, value: float = 1.0) -> None:
        for chunk in update_chunks(window, [("table", torch.full((2, 2), value))]):
            self.real.receive(client, pb.ClientMessage(update=chunk))

    def commit(self, window: int, scale: float = 1.0) -> None:
        self.real.order(RANKS[0], pb.Order(commit=pb.Commit(window=window, scale=scale)))

    def reported(self, kind: str, rank: int = 0) -> list[Any]:
        mine = [report for name, report in self.endpoint.reports if name == RANKS[rank]]
        return [getattr(report, kind) for report in mine if report.WhichOneof("body") == kind]

    def combine(self, window: int) -> None:
        """Both clients deliver a window, and it is combined."""
        self.expect(window)
        self.update("ada", window)
        self.update("bo", window)
        self.until(lambda: self.reported("combined"))

    def updates(self, client: str) -> list[int]:
        """Windows whose combined update is on its way to a client."""
        chunks = [m.update for name, m in self.endpoint.sent if name == client and m.HasField("update")]
        return [chunk.window for chunk in chunks if chunk.last]

    def until(self, condition: Any) -> None:
        deadline = time.monotonic() + 30.0
        while not condition():
            assert time.monotonic() < deadline
            self.real.attend()
            time.sleep(0.001)


def test_nothing_moves_before_the_ranks_commit(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.combine(0)
    for _ in range(20):
        run.real.attend()
    assert run.updates("ada") == []
    run.commit(0)
    run.until(lambda: run.updates("ada") == run.updates("bo") == [0])


def test_a_commit_may_come_first_and_windows_stay_in_order(tmp_path: Path) -> None:
    run = Run(tmp_path, staleness=1)
    run.commit(0)
    for window in (0, 1):
        run.update("bo", window)
        run.expect(window)
        run.update("ada", window)
    run.until(lambda: run.updates("bo") == [0])
    run.until(lambda: len(run.reported("combined", rank=1)) == 2)
    assert [combined.window for combined in run.reported("combined", rank=1)] == [0, 1]
    run.commit(1)
    run.until(lambda: run.updates("bo") == [0, 1])


def test_a_window_goes_on_without_a_client_that_is_late(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.expect(0)
    run.update("ada", 0)
    run.real.order(RANKS[1], pb.Order(drop=pb.Drop(client="bo")))
    run.commit(0)
    run.until(lambda: run.updates("bo") == [0])
    run.update("bo", 0)  # too late; ignored
    assert run.reported("lost", rank=1) == []


def test_what_was_delivered_early_counts_though_its_client_is_gone(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.update("bo", 0, value=5.0)
    run.real.order(RANKS[1], pb.Order(expect=pb.Expect(window=0, clients=["bo"], masked=[1])))
    run.real.disconnected("bo")
    assert [lost.client for lost in run.reported("lost", rank=1)] == ["bo"]
    run.real.order(RANKS[0], pb.Order(expect=pb.Expect(window=0, clients=["ada"], masked=[1])))
    run.update("ada", 0, value=1.0)
    run.commit(0)
    run.until(lambda: run.updates("ada") == [0])
    [chunk] = [m.update for name, m in run.endpoint.sent if name == "ada" and m.update.name == "table"]
    assert chunk.compressed or torch.frombuffer(bytearray(chunk.payload), dtype=torch.float32)[0] == 6.0


def test_a_client_cannot_pile_updates_up(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.update("bo", 0)
    assert run.reported("lost", rank=1) == []
    run.update("bo", 1)
    [lost] = run.reported("lost", rank=1)
    assert "an update of window 1, which is not under way" in lost.reason
    run.until(lambda: any(message.HasField("refused") for _, message in run.endpoint.sent))


@pytest.mark.parametrize(
    ("rank", "order", "told"),
    [
        (1, pb.Order(commit=pb.Commit(window=0, scale=1.0)), "an order of kind commit is rank 0's"),
        (1, pb.Order(finish=pb.Finish()), "an order of kind finish is rank 0's"),
        (0, pb.Order(commit=pb.Commit(window=0, scale=0.0)), "badly scaled"),
        (0, pb.Order(commit=pb.Commit(window=0, scale=float("nan"))), "badly scaled"),
        (0, pb.Order(), "an order of kind None was not expected"),
    ],
)
def test_an_order_that_does_not_fit_is_an_error(tmp_path: Path, rank: int, order: pb.Order, told: str) -> None:
    with pytest.raises(WireError, match=told):
        Run(tmp_path).real.order(RANKS[rank], order)


def test_nothing_is_saved_in_the_middle_of_a_window(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.expect(0)
    with pytest.raises(WireError, match="while an earlier one is being combined"):
        run.real.order(RANKS[0], pb.Order(save=pb.Save(window=1)))


def test_a_client_that_joins_in_the_middle_begins_with_the_newest_reference(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.real.disconnected("bo")
    [lost] = run.reported("lost", rank=1)
    assert lost.may_return and "lost its connection" in lost.reason
    run.real.order(RANKS[1], pb.Order(drop=pb.Drop(client="bo", gone=True)))
    for window in (0, 1):
        run.expect(window, without="bo")
        run.update("ada", window)
        run.commit(window)
        run.until(lambda window=window: run.updates("ada")[-1:] == [window])
        if window == 0:
            run.real.order(RANKS[1], pb.Order(admit=pb.Admit(clients=[admission("bo")])))
            run.real.order(RANKS[1], pb.Order(begin=pb.BeginClient(client="bo", reference=True)))
    run.endpoint.sent.clear()
    run.real.connected("bo")
    run.expect(2)
    run.update("ada", 2)
    run.update("bo", 2)
    run.commit(2)
    run.until(lambda: run.updates("bo") == [2])
    mine = [message for client, message in run.endpoint.sent if client == "bo"]
    assert mine[0].begin.window == 2 and mine[1].reference.last, "windows 0 and 1 are in it"
    assert run.updates("ada") == [2]


def test_a_late_end_of_its_last_stream_does_not_part_with_a_client_that_is_back(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.real.order(RANKS[1], pb.Order(drop=pb.Drop(client="bo", gone=True)))
    run.real.order(RANKS[1], pb.Order(admit=pb.Admit(clients=[admission("bo")])))
    run.real.disconnected("bo")
    assert run.reported("lost", rank=1) == []


@pytest.mark.parametrize("is_late", [False, True])
def test_a_client_with_a_state_of_its_own_must_not_miss_a_window(tmp_path: Path, is_late: bool) -> None:
    run = Run(tmp_path, mode="parallel")
    run.real.order(RANKS[1], pb.Order(admit=pb.Admit(clients=[admission("cy")])))
    run.real.order(RANKS[1], pb.Order(begin=pb.BeginClient(client="cy", reference=False)))
    if is_late:
        run.expect(0, average=True)
        run.update("ada", 0)
        run.update("bo", 0)
        run.commit(0)
        run.until(lambda: run.updates("ada") == [0])
    run.real.connected("cy")
    lost = run.reported("lost", rank=1)
    assert [(one.client, one.may_return) for one in lost] == ([("cy", True)] if is_late else [])
    assert not any(client == "cy" and message.HasField("reference") for client, message in run.endpoint.sent)


# -- windows that are undone -----------------------------------------------------------------------


def weights(run: Run) -> float:
    """What every number of the reference is."""
    run.begin(0, "ada")
    run.until(lambda: any(client == "ada" and m.HasField("reference") for client, m in run.endpoint.sent))
    data = b"".join(m.reference.payload for client, m in run.endpoint.sent if client == "ada")
    return float(from_bytes(data, SHAPES)[0].weights["table"][0, 0])


def undo(run: Run, window: int, attempt: int = 1, rank: int | None = None) -> None:
    for name in RANKS if rank is None else [RANKS[rank]]:
        run.real.order(name, pb.Order(undo=pb.Undo(window=window, attempt=attempt)))


def begun(run: Run, client: str, attempt: int = 1) -> None:
    run.real.receive(client, pb.ClientMessage(begun=pb.Begun(attempt=attempt)))


def test_a_window_that_is_undone_leaves_nothing_and_is_combined_again(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.expect(0)
    run.update("ada", 0, value=5.0)
    run.update("bo", 0, value=5.0)
    run.until(lambda: run.reported("combined"))
    run.update("bo", 1, value=9.0)  # early, for the window after it
    half, *_ = update_chunks(1, [("table", torch.ones(2, 2))])
    run.real.receive("ada", pb.ClientMessage(update=half))  # the rest of it does not come
    undo(run, 0, rank=0)
    assert run.reported("undone") == [], "the other rank may still announce windows of before"
    undo(run, 0, rank=1)
    assert run.reported("undone") == run.reported("undone", rank=1) == [pb.Undone(attempt=1)]
    run.endpoint.sent.clear()
    for rank, client in enumerate(("ada", "bo")):
        run.begin(rank, client, reference=False, attempt=1)
    run.update("ada", 0, value=7.0)  # it has not heard of it
    for client in ("ada", "bo"):
        begun(run, client, attempt=0)
        run.update(client, 0, value=7.0)
        begun(run, client)
    run.expect(0)
    run.update("ada", 0, value=1.0)
    run.update("bo", 0, value=2.0)
    run.commit(0)
    run.until(lambda: run.updates("ada") == [0])
    [chunk] = [m.update for name, m in run.endpoint.sent if name == "ada" and m.update.name == "table"]
    assert decoded(chunk) == 3.0
    marks = [m.begin for name, m in run.endpoint.sent if name == "ada" and m.HasField("begin")]
    assert marks == [pb.Begin(attempt=1, window=0)] and not run.reported("lost")


def decoded(chunk: pb.UpdateChunk) -> float:
    assembler = UpdateAssembler(SHAPES, "test")
    assembler.take(chunk)
    assembler.take(pb.UpdateChunk(last=True))
    return float(assembler.finish()["table"][0, 0])


def test_the_reference_goes_back_to_what_was_saved(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for window in range(3):
        run.expect(window)
        run.update("ada", window)
        run.update("bo", window)
        run.commit(window)
        run.until(lambda window=window: run.updates("ada")[-1:] == [window])
        run.real.order(RANKS[0], pb.Order(save=pb.Save(window=window + 1)))
    before = AggregatorFolder(tmp_path).load(2, SHAPES)[0].weights["table"]
    undo(run, 2)
    run.endpoint.sent.clear()
    assert weights(run) == float(before[0, 0])
    assert AggregatorFolder(tmp_path).saved_windows() == (2,), "window 3 is saved again when it comes again"
    assert [m.begin.window for client, m in run.endpoint.sent if m.HasField("begin")] == [2]


def test_whoever_begins_while_windows_are_undone_gets_the_reference_of_afterwards(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.combine(0)
    undo(run, 0, rank=0)
    run.real.order(RANKS[0], pb.Order(admit=pb.Admit(clients=[admission("cy")])))
    run.endpoint.sent.clear()
    run.begin(0, "cy", attempt=1)
    run.real.attend()
    assert not run.endpoint.sent
    undo(run, 0, rank=1)
    run.until(lambda: any(m.HasField("reference") for client, m in run.endpoint.sent if client == "cy"))
    begun_with = next(m.begin for client, m in run.endpoint.sent if client == "cy")
    assert (begun_with.attempt, begun_with.window, begun_with.reference) == (1, 0, True)
    run.expect(0)
    run.update("cy", 0)  # it was not there before, so it need not say that it has heard
    assert run.reported("delivered")[-1] == pb.Delivered(window=0, client="cy", whole=True)


@pytest.mark.parametrize("attempt", [0, 1])
def test_windows_are_not_undone_twice_for_one_time(tmp_path: Path, attempt: int) -> None:
    run = Run(tmp_path)
    undo(run, 0)
    with pytest.raises(WireError, match=f"undone for time {attempt} after time 1"):
        undo(run, 0, attempt, rank=0)


def test_a_window_is_not_undone_while_it_is_combined(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.expect(0)
    with pytest.raises(WireError, match="window 0 is to be undone while it is being combined"):
        undo(run, 0)


def test_a_rank_of_another_run_is_not_heard(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.real.order(rank_name(2), pb.Order(finish=pb.Finish()))
    assert run.real.finish is None
