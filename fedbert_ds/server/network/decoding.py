"""A rank's events with tensors in place of bytes; a thread decodes them beside the body."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from torch import Tensor

from fedbert_ds.errors import WireError
from fedbert_ds.server.contract import Contract, TensorContract
from fedbert_ds.server.network.events import (
    POLL_SECONDS,
    Attached,
    Connected,
    Detached,
    Disconnected,
    Event,
    JoinAbandoned,
    JoinAsked,
    Received,
)
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.codecs import decode

EVENTS_AHEAD = 64
"""Decoded events that may wait for the body. More wait at the endpoint and slow clients down."""


@dataclass(frozen=True)
class Decoded:
    """A message of a connected client and its tensor."""

    client: str
    message: pb.ClientMessage
    tensor: Tensor | WireError | None
    """[rows, width] fp32, or what is wrong with it; None for a message without a tensor."""


DecodedEvent = JoinAsked | JoinAbandoned | Connected | Decoded | Detached | Attached | Disconnected


def decoded(event: Event, contract: Contract) -> DecodedEvent:
    """The event, its message's tensor decoded. A bad tensor travels on as a WireError."""
    if not isinstance(event, Received):
        return event
    return Decoded(event.client, event.message, _tensor(event.client, event.message, contract))


def sender(client: str, what: str, micro_batch: int) -> str:
    """The sender of a tensor, for an error message."""
    return f"client {client}: {what} of micro-batch {micro_batch}"


class Decoding:
    """Hands an endpoint's events on, in order and decoded, through a thread.

    `source` is the endpoint's `next_event`. After `start` nobody else may take events from it.
    """

    def __init__(self, source: Callable[[float], Event | None], contract: Contract) -> None:
        self._source = source
        self._contract = contract
        self._events: queue.Queue[DecodedEvent | BaseException] = queue.Queue(EVENTS_AHEAD)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Take no more events; those not handed on are lost. Further calls do nothing."""
        self._is_over.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    @property
    def is_running(self) -> bool:
        """Whether the thread still takes events."""
        return self._thread.is_alive()

    def next_event(self, timeout: float) -> DecodedEvent | None:
        """The oldest event, waiting up to `timeout` seconds. Raises what the source raised."""
        try:
            event = self._events.get(timeout=timeout) if timeout > 0 else self._events.get_nowait()
        except queue.Empty:
            return None
        if isinstance(event, BaseException):
            self._events.put_nowait(event)
            raise event
        return event

    # -- in the thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._is_over.is_set():
            try:
                event = self._source(POLL_SECONDS)
                if event is not None:
                    self._hand_on(decoded(event, self._contract))
            except BaseException as error:
                self._hand_on(error)
                return

    def _hand_on(self, event: DecodedEvent | BaseException) -> None:
        while not self._is_over.is_set():
            with suppress(queue.Full):
                return self._events.put(event, timeout=POLL_SECONDS)


def _tensor(client: str, message: pb.ClientMessage, contract: Contract) -> Tensor | WireError | None:
    match message.WhichOneof("body"):
        case "activations":
            frame, micro_batch = message.activations.values, message.activations.micro_batch
            return _decode(frame, contract.activations, sender(client, "activations", micro_batch))
        case "gradient":
            frame, micro_batch = message.gradient.hidden, message.gradient.micro_batch
            return _decode(frame, contract.gradients, sender(client, "gradient", micro_batch))
    return None


def _decode(frame: pb.TensorFrame, contract: TensorContract, who: str) -> Tensor | WireError:
    rows = frame.shape[0] if len(frame.shape) == 2 else 0
    if rows > contract.most_rows:
        # Before memory is taken for it; the plan knows a smaller number still.
        return WireError(f"{who}: {rows} rows; no piece has more than {contract.most_rows}")
    try:
        return decode(frame, (rows, contract.width), contract.codec, who)
    except WireError as error:
        return error
