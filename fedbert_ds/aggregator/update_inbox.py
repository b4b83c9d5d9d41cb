"""What clients send to the aggregator, checked once, before it can meet another client's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fedbert_ds.errors import WireError
from fedbert_ds.federation.client_update import Tensors, UpdateAssembler
from fedbert_ds.wire import fedbert_pb2 as pb

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class ArrivedUpdate:
    """A chunk of an update came in; with the last one, the update."""

    window: int
    is_model: bool
    """A whole client model, for the run's result; otherwise the update of a window."""
    decode: Callable[[], Tensors] | None
    """Decodes the update, which takes a while; None while chunks are missing."""


class UpdateInbox:
    """Joins each client's chunks. `receive` raises WireError for anything else than an update.

    `exchanged` are the shapes of the tensors in updates, `handed_over` of those for the run's
    result; `codec` is that of updates. What is handed over travels in fp32.
    """

    def __init__(self, exchanged: Shapes, handed_over: Shapes, codec: str) -> None:
        self._exchanged, self._handed_over, self._codec = exchanged, handed_over, codec
        self._assemblers: dict[str, tuple[int, UpdateAssembler]] = {}
        self._collecting: int | None = None

    def collect(self, window: int) -> None:
        """From now on take whole client models, as before `window`."""
        self._collecting = window

    def receive(self, client: str, message: pb.ClientMessage) -> ArrivedUpdate:
        """Take a chunk."""
        kind = message.WhichOneof("body")
        if kind != "update":
            raise WireError(f"client {client}: a message of kind {kind} belongs to the server, not to the aggregator")
        chunk = message.update
        is_model = chunk.window == self._collecting
        if client not in self._assemblers:
            shapes, codec = (self._handed_over, "fp32") if is_model else (self._exchanged, self._codec)
            self._assemblers[client] = chunk.window, UpdateAssembler(shapes, f"client {client}: its update", codec)
        window, assembler = self._assemblers[client]
        if chunk.window != window:
            raise WireError(f"client {client}: an update of window {chunk.window} inside that of window {window}")
        if not assembler.take(chunk):
            return ArrivedUpdate(window, is_model, None)
        del self._assemblers[client]
        return ArrivedUpdate(window, is_model, assembler.finish)

    def drop(self, client: str) -> None:
        """Drop what has come of a client's unfinished update."""
        self._assemblers.pop(client, None)
