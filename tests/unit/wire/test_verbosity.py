"""GRPC_VERBOSITY of a client and of a process that listens."""

from __future__ import annotations

import pytest

from fedbert_ds.wire.verbosity import VARIABLE, be_quiet, tell_of_handshakes


@pytest.mark.parametrize(("before", "after"), [(None, "ERROR"), ("DEBUG", "DEBUG"), ("NONE", "NONE")])
def test_a_client_is_quiet_unless_its_user_wants_more(before: str | None, after: str) -> None:
    environment = {} if before is None else {VARIABLE: before}
    be_quiet(environment)
    assert environment == {VARIABLE: after}


@pytest.mark.parametrize("before", [None, "", "ERROR", "none", "INFO", "debug"])
def test_who_listens_hears_of_handshakes(before: str | None) -> None:
    environment = {"HOME": "/home/ada"} | ({} if before is None else {VARIABLE: before})
    tell_of_handshakes(environment)
    assert environment.get(VARIABLE) == (before if before in ("INFO", "debug") else None)
    assert environment["HOME"] == "/home/ada"
