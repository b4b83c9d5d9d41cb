"""The reference as messages to clients that begin: turned into bytes once for all that get it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fedbert_ds.federation.reference import Reference, reference_chunks, to_bytes
from fedbert_ds.wire import fedbert_pb2 as pb


class ReferenceMessages:
    """Keeps the bytes of the newest reference that was asked for.

    With `shares_moments` they hold what the optimizer remembers, too.
    """

    def __init__(self, shares_moments: bool) -> None:
        self._shares_moments = shares_moments
        self._newest: tuple[int, bytes] | None = None
        """A version, and its bytes."""

    def of(self, reference: Reference) -> Callable[[], Iterator[pb.ServerMessage]]:
        """Makes the messages of a reference.

        The tensors may move afterwards: the bytes are as of this call.
        """
        version = reference.version
        if self._newest is None or self._newest[0] != version:
            moments = reference.optimizer if self._shares_moments else {}
            self._newest = version, to_bytes(Reference(version, reference.weights, moments))
        data = self._newest[1]

        return lambda: reference_chunks(data)
