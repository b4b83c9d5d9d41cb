"""A rank's rooms over real gRPC: links that break, a client that fails. The engine is a fake."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from unit.server.bad_clients import BAD
from unit.server.fake_client import FakeClient
from unit.server.fakes import FakeEngine, FakeRankGroup, Served, run_config, seats
from unit.server.network.loopback import KINDS, TIMEOUT, Listening, Stream, listening

from fedbert_ds.bench.network.link import DelayProxy
from fedbert_ds.config import RunConfig
from fedbert_ds.server.contract import RankStatus
from fedbert_ds.wire import fedbert_pb2 as pb


@pytest.fixture(params=KINDS)
def endpoint(request: pytest.FixtureRequest) -> Iterator[Listening]:
    with listening(request.param) as started:
        yield started


class RemoteClient(threading.Thread):
    """A FakeClient at the other end of a real stream."""

    def __init__(self, address: str, client: FakeClient) -> None:
        super().__init__(daemon=True, name=client.name)
        self.client = client
        self.error: BaseException | None = None
        self._address = address

    def run(self) -> None:
        stream = Stream(self._address, self.client.name)
        try:
            while self.client.finish is None and self.client.refusal is None:
                for answer in self.client.handle(stream.receive()):
                    stream.send(answer)
        except BaseException as error:
            self.error = error
        finally:
            stream.end()


def trio(config: RunConfig, bo: FakeClient | None = None) -> list[FakeClient]:
    return [
        FakeClient("ada", config),
        bo or FakeClient("bo", config, (4, 3, 3, 2)),
        FakeClient("cy", config, (2, 2, 8, 1)),
    ]


def serve(endpoint: Listening, address: str, config: RunConfig, clients: list[FakeClient]) -> list[str]:
    """Train a whole run with clients that dial `address`; return the reported problems."""
    places = seats(clients)
    endpoint.real.admit({name: seat.session for name, seat in places.items()})
    rank = Served(config, FakeEngine(), endpoint.real, FakeRankGroup(), places)
    remote = [RemoteClient(address, client) for client in clients]
    for thread in remote:
        thread.start()
    statuses: list[RankStatus] = []
    assert rank.train(statuses) == config.run.windows
    rank.rooms.service.finish("done", complete=True)
    for thread in remote:
        thread.join(timeout=TIMEOUT)
        assert not thread.is_alive()
        assert thread.error is None, thread.error
    return [problem for status in statuses for problem in status.new_problems]


def test_a_rank_and_its_clients_do_not_notice_links_that_break(endpoint: Listening) -> None:
    config = run_config(run={"windows": 6})
    clients = trio(config)
    proxy = DelayProxy(endpoint.address, cut_bytes=(1_500, 4_000), cuts=20, outage_ms=50, seed=5)
    with proxy as through:
        problems = serve(endpoint, through, config, clients)
        assert proxy.counts()["cuts"] >= 3
    assert problems == []
    for client in clients:
        assert client.windows_stepped == list(range(6))
        assert client.finish == pb.Finish(reason="done", complete=True)


@pytest.mark.parametrize("fault", [None, "activations out of all measure", "gradient of another shape"])
def test_a_rank_serves_on_after_a_client_failed(endpoint: Listening, fault: str | None) -> None:
    config = run_config(clients={"minimum": 2}, run={"windows": 3})
    clients = trio(config, FakeClient("bo", config, (4, 3, 3, 2), BAD[fault][0]()) if fault else None)
    problems = serve(endpoint, endpoint.address, config, clients)
    for client in clients:
        if fault and client.name == "bo":
            assert client.refusal is not None and BAD[fault][1] in client.refusal
            assert problems == [client.refusal]
        else:
            assert client.windows_stepped == [0, 1, 2]
            assert client.hidden_states == 3 * sum(length // 2 for length in client.lengths)
            assert client.finish == pb.Finish(reason="done", complete=True)
