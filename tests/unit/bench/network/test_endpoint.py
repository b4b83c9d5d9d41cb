"""The measured endpoint would tell a lost or doubled message."""

from __future__ import annotations

from fedbert_ds.bench.network.endpoint import ClientProcess, Load, MeasuredEndpoint


def test_a_lost_message_would_be_told() -> None:
    with MeasuredEndpoint(("ada", "bo"), answer_bytes=1000) as endpoint, ClientProcess() as clients:
        clients.run(Load(endpoint.address, ("ada",), message_bytes=1000, messages=5))
        assert clients.result().wrong == 0
        clients.run(Load(endpoint.address, ("bo",), message_bytes=1000, messages=5, first=2))
        clients.result()
        assert endpoint.usage().wrong == 5
