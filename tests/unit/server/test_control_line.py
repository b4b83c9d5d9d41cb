"""A rank's conversation with an aggregator, against its real endpoint: how each loss is told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fedbert_ds.aggregator.endpoint import AggregatorEndpoint, Ordered
from fedbert_ds.config import RunConfig
from fedbert_ds.errors import AggregatorLost, WireError
from fedbert_ds.server.control_line import ControlLine, open_run
from fedbert_ds.server.network.events import Connected
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.aggregation import rank_name

TIMEOUT = 30.0


@pytest.fixture
def listening() -> Iterator[tuple[AggregatorEndpoint, str]]:
    endpoint = AggregatorEndpoint("127.0.0.1", 0, None, TIMEOUT)
    port = endpoint.start()
    endpoint.admit({rank_name(1): "a session"})
    yield endpoint, f"127.0.0.1:{port}"
    endpoint.stop(grace=0.1)


def test_orders_go_and_reports_come(listening: tuple[AggregatorEndpoint, str]) -> None:
    endpoint, address = listening
    line = ControlLine(address, None, 1, "a session", reconnect_timeout=5.0)
    line.start()
    assert endpoint.next_event(TIMEOUT) == Connected(rank_name(1), "a session")
    assert line.take() is None
    line.send(pb.Order(drop=pb.Drop(client="ada")))
    event = endpoint.next_event(TIMEOUT)
    assert isinstance(event, Ordered) and event.order.drop.client == "ada"
    endpoint.report(rank_name(1), pb.Report(admitted=pb.Admitted(window=2)))
    assert line.take(TIMEOUT) == pb.Report(admitted=pb.Admitted(window=2))
    endpoint.report(rank_name(1), pb.Report(failed=pb.Failed(reason="its disk is full")))
    for _ in range(2):  # and again, whoever asks
        with pytest.raises(AggregatorLost, match=r"is lost: its disk is full$"):
            line.take(TIMEOUT)
    line.stop()
    line.stop()


def test_an_aggregator_that_restarted_does_not_know_the_session(listening: tuple[AggregatorEndpoint, str]) -> None:
    _, address = listening
    line = ControlLine(address, None, 1, "of the process before", reconnect_timeout=5.0)
    line.start()
    with pytest.raises(AggregatorLost, match=r"the aggregator refused this rank: .* no such session"):
        line.take(TIMEOUT)
    line.stop()


def test_an_aggregator_that_is_gone_is_lost_after_a_while(listening: tuple[AggregatorEndpoint, str]) -> None:
    endpoint, address = listening
    line = ControlLine(address, None, 1, "a session", reconnect_timeout=0.2)
    line.start()
    assert endpoint.next_event(TIMEOUT) == Connected(rank_name(1), "a session")
    endpoint.stop(grace=0.0)
    with pytest.raises(AggregatorLost, match=address):
        line.take(TIMEOUT)
    line.stop()


def test_nobody_there_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("a secret of two parties")
    section = {"address": "127.0.0.1:9", "secret": str(tmp_path / "secret")}
    config = RunConfig(aggregator=section, clients={"join_timeout": 0.2})
    with pytest.raises(WireError, match=r"127.0.0.1:9: no aggregator answers; check aggregator.address"):
        open_run(config, 1, 23, 0, "shape", False)
