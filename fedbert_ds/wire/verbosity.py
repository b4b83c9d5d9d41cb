"""What gRPC writes on standard error. It reads this when it is imported."""

from __future__ import annotations

from collections.abc import MutableMapping

VARIABLE = "GRPC_VERBOSITY"
_TELLING = ("INFO", "DEBUG")
"""Values with which it writes of failed handshakes, as it does without the variable."""


def be_quiet(environment: MutableMapping[str, str]) -> None:
    """Of a client: what is wrong is told in one line of ours. What a user has set stays."""
    environment.setdefault(VARIABLE, "ERROR")


def tell_of_handshakes(environment: MutableMapping[str, str]) -> None:
    """Of a process that listens with TLS: its log counts those that failed (`handshakes`)."""
    if environment.get(VARIABLE, "INFO").upper() not in _TELLING:
        del environment[VARIABLE]
