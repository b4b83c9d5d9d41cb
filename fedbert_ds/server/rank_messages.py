"""What ranks tell each other, as bytes that are signed: data of a known type, never code."""

from __future__ import annotations

import hmac
import os
import secrets
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import msgpack
from pydantic import TypeAdapter, ValidationError

from fedbert_ds.atomic_write import write_text
from fedbert_ds.errors import ConfigError, WireError
from fedbert_ds.folder_lock import private

SECRET = "FEDBERT_RANK_SECRET"
"""Environment variable with which a launcher may give the ranks a secret of its own."""
SIGNATURE_BYTES = 32


class RankMessages:
    """Packs and unpacks values of a type, each exchange with its number and its sender's rank.

    A message that was not packed with the same secret, or for another exchange, is refused before
    it is read. So a stranger that takes a rank's place can say nothing, and a value is checked
    against its type.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._exchanges = 0

    def begin(self) -> None:
        """A new exchange. All ranks begin the same ones, in the same order."""
        self._exchanges += 1

    def pack(self, value: Any, kind: Any, sender: int) -> bytes:
        """Sign and serialize. `kind` is a type as in an annotation."""
        payload: bytes = msgpack.packb(_adapter(kind).dump_python(value), default=_as_list)
        return self._signature(payload, sender) + payload

    def unpack(self, data: bytes, kind: Any, sender: int) -> Any:
        """What `sender` packed; WireError if it was not a rank of this run, or is no such value."""
        signature, payload = data[:SIGNATURE_BYTES], data[SIGNATURE_BYTES:]
        if not hmac.compare_digest(signature, self._signature(payload, sender)):
            raise WireError(
                f"what came as rank {sender}'s is not of a rank of this run: its signature is wrong; make sure that "
                f"nobody else can reach the ranks' ports, and that {SECRET}, if set, is the same on all nodes"
            )
        try:
            return _adapter(kind).validate_python(msgpack.unpackb(payload, strict_map_key=False))
        except (ValueError, ValidationError) as error:
            raise WireError(
                f"rank {sender} said something else than was due; install the same version on all nodes"
            ) from error

    def _signature(self, payload: bytes, sender: int) -> bytes:
        return hmac.digest(self._secret, b"%d %d " % (self._exchanges, sender) + payload, "sha256")


class RankSecret:
    """The secret of one start of the ranks: from the launcher's environment, or drawn by rank 0 and
    left, for its user's eyes alone, in a file beside the run's folder until all have it.
    """

    def __init__(self, run_folder: Path, environment: Mapping[str, str] = os.environ) -> None:
        self._given = environment.get(SECRET, "")
        self._file = run_folder.with_name(f"{run_folder.name}.rank-secret")

    def offer(self) -> None:
        """Rank 0 does, before it joins a group."""
        if not self._given:
            with private():
                write_text(self._file, secrets.token_hex(32))

    def read(self) -> bytes:
        """Every rank does, in a group with rank 0; ConfigError where there is no such file."""
        if self._given:
            return self._given.encode()
        try:
            return self._file.read_bytes()
        except OSError as error:
            raise ConfigError(
                f"{self._file}: not on this node ({error.strerror}); put run.directory on a file system that all "
                f"nodes share, or give the ranks a secret in {SECRET}"
            ) from error

    def remove(self) -> None:
        """Rank 0 does, once all have read it."""
        self._file.unlink(missing_ok=True)


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _as_list(value: Any) -> list[Any]:
    if isinstance(value, (set, frozenset, tuple)):
        return list(value)
    raise TypeError(f"a {type(value).__name__} cannot be told to other ranks")
