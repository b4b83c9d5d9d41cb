"""Answering a Join: once, and to nobody without harm."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from fedbert_ds.errors import WireError
from fedbert_ds.server.network.events import reply
from fedbert_ds.wire import fedbert_pb2 as pb


def test_a_welcome_or_a_refusal_answers_a_join_once() -> None:
    answer: Future[pb.Welcome] = Future()
    reply(answer, pb.Welcome(endpoint="here:3"))
    reply(answer, WireError("too late"))
    assert answer.result(timeout=0) == pb.Welcome(endpoint="here:3")
    refused: Future[pb.Welcome] = Future()
    reply(refused, WireError("no text"))
    reply(refused, pb.Welcome())
    with pytest.raises(WireError, match="no text"):
        refused.result(timeout=0)


@pytest.mark.parametrize("outcome", [pb.Welcome(), WireError("no text")], ids=["welcome", "refusal"])
def test_a_client_that_went_away_is_not_answered(outcome: pb.Welcome | WireError) -> None:
    answer: Future[pb.Welcome] = Future()
    answer.cancel()
    reply(answer, outcome)
    assert answer.cancelled()
