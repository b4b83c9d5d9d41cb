"""An aggregator's process in a thread, and the ranks and clients of a run around it."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedbert_ds.aggregator.process import run_aggregator
from fedbert_ds.config import RunConfig
from fedbert_ds.federation.client_update import UpdateAssembler, update_chunks
from fedbert_ds.federation.reference import Reference, ReferenceAssembler
from fedbert_ds.model.checkpoint import build_model, shape_hash
from fedbert_ds.model.cut import split
from fedbert_ds.run_file import parse_config
from fedbert_ds.server.admission import new_session
from fedbert_ds.server.control_line import ControlLine, open_run
from fedbert_ds.server.queue.deadlines import Deadlines
from fedbert_ds.server.remote_aggregator import RemoteAggregator
from fedbert_ds.server.remote_exchange import RemoteExchange
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.stream import AggregatorStream

TIMEOUT = 60.0
WORDS, PADDING = 23, 0


def config_of(folder: Path, **sections: Any) -> RunConfig:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "secret").write_text("a secret of two parties\n")
    tree: dict[str, Any] = {
        "run": {"directory": str(folder / "run"), "windows": 4},
        "model": {"hidden_size": 8, "num_attention_heads": 2, "max_position_embeddings": 16},
        "data": {"sequence_length": 16},
        "optimizer": {"name": "sgd", "lr": 0.5, "schedule": "constant", "gradient_clipping": 1.0, "weight_decay": 0.0},
        "clients": {"join_timeout": TIMEOUT, "reconnect_timeout": 5.0},
        "aggregator": {"address": f"127.0.0.1:{port}", "secret": str(folder / "secret")},
    }
    for section, values in sections.items():
        tree[section] = {**tree.get(section, {}), **values}
    return parse_config(tree, "test")


def first_weights(config: RunConfig, seed: int | None = None) -> dict[str, Tensor]:
    """The client model of a run that begins, fp32 by name."""
    model = build_model(config.model, WORDS, PADDING, config.run.seed if seed is None else seed)
    return {name: parameter.detach() for name, parameter in split(model, "embeddings")[0].named_parameters()}


class Process:
    """`run_aggregator` in a thread; its exit code or error comes out of `ended`."""

    def __init__(self, config: RunConfig, resume: bool = False) -> None:
        self._outcome: queue.SimpleQueue[int | BaseException] = queue.SimpleQueue()
        threading.Thread(target=self._run, args=(config, resume), daemon=True).start()

    def _run(self, config: RunConfig, resume: bool) -> None:
        try:
            self._outcome.put(run_aggregator(config, resume))
        except BaseException as error:
            self._outcome.put(error)

    def ended(self) -> int | BaseException:
        return self._outcome.get(timeout=TIMEOUT)


def opened(config: RunConfig, ranks: int = 1, resume: bool = False, **changes: Any) -> pb.Opened:
    model = build_model(config.model, WORDS, PADDING, seed=0)
    return open_run(config, ranks, WORDS, PADDING, shape_hash(model.config), resume, **changes)


class Rank:
    """One rank's exchange, over a real line."""

    def __init__(self, config: RunConfig, rank: int, session: str, window: int = 0) -> None:
        assert config.aggregator is not None
        self.line = ControlLine(config.aggregator.address, None, rank, session, reconnect_timeout=5.0)
        self.remote = RemoteAggregator(self.line, window)
        self.exchange = RemoteExchange(self.remote, Deadlines())
        self.line.start()

    def combined(self) -> int:
        """The next window that is combined."""
        waited = threading.Event()
        for _ in range(int(TIMEOUT / 0.01)):
            if (result := self.exchange.poll()) is not None:
                return result[0]
            waited.wait(0.01)
        raise AssertionError("nothing was combined")

    def lost(self) -> tuple[str, str]:
        """The next client that the aggregator parted with, and why."""
        waited = threading.Event()
        for _ in range(int(TIMEOUT / 0.01)):
            if lost := self.exchange.take_unsound():
                return lost[0][0], str(lost[0][1])
            waited.wait(0.01)
        raise AssertionError("nobody was lost")


class Client:
    """A client's stream to the aggregator."""

    def __init__(self, config: RunConfig, name: str, session: str) -> None:
        assert config.aggregator is not None
        self.shapes = {name: tuple(tensor.shape) for name, tensor in first_weights(config).items()}
        address = config.aggregator.address
        self.stream = AggregatorStream(address, None, name, session, 5.0, shares_memory=False)
        self.stream.__enter__()

    def reference(self) -> Reference:
        """The next one, which a Begin announces."""
        begin = self.stream.receive().begin
        assembler = ReferenceAssembler(self.shapes)
        while (whole := assembler.add(self.stream.receive().reference)) is None:
            pass
        assert begin.reference and begin.window == whole.version
        return whole

    def send(self, window: int, value: float) -> None:
        """An update whose every number is `value`."""
        tensors = {name: torch.full(shape, value) for name, shape in self.shapes.items()}
        for chunk in update_chunks(window, tensors.items()):
            self.stream.send(pb.ClientMessage(update=chunk))

    def update(self) -> tuple[int, dict[str, Tensor]]:
        """(window, what comes back)."""
        assembler = UpdateAssembler(self.shapes, "test")
        while True:
            chunk = self.stream.receive().update
            if (whole := assembler.add(chunk)) is not None:
                return chunk.window, dict(whole)

    def leave(self) -> None:
        self.stream.__exit__()


@contextmanager
def federation(
    config: RunConfig, clients: tuple[tuple[str, ...], ...], window: int = 0, resume: bool = False
) -> Iterator[tuple[list[Rank], dict[str, Client]]]:
    """The ranks and clients of an open run; `clients` by rank. Hangs all lines up."""
    sessions = opened(config, len(clients), resume).sessions
    ranks = [Rank(config, rank, session, window) for rank, session in enumerate(sessions)]
    of_clients = {name: new_session() for names in clients for name in names}
    for rank, names in zip(ranks, clients, strict=True):
        rank.remote.admit({name: of_clients[name] for name in names}, TIMEOUT)
        for name in names:
            rank.remote.begin(name, 0, with_reference=True)
    here = {name: Client(config, name, session) for name, session in of_clients.items()}
    try:
        yield ranks, here
    finally:
        for client in here.values():
            client.leave()
        for rank in ranks:
            rank.line.stop()
