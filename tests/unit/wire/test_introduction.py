"""Who calls, in a call's metadata."""

from __future__ import annotations

import pytest

from fedbert_ds.errors import WireError
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.introduction import KEY, introduced, introduction


def test_what_is_said_is_heard_among_other_metadata() -> None:
    hello = pb.Hello(client="ada", shard_characters=7)
    assert introduction([("user-agent", "grpc"), *introduced(hello)], pb.Hello) == hello


@pytest.mark.parametrize("metadata", [None, [], [("user-agent", "x")], [(KEY, b"\xff\xff\xff")], [(KEY, "no bytes")]])
def test_nothing_understood_is_one_line(metadata: object) -> None:
    with pytest.raises(WireError, match="does not say who it is; install the same fedbert-ds on both sides"):
        introduction(metadata, pb.Attach)  # type: ignore[arg-type]
