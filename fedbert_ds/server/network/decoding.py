"""A rank's events with their tensors decoded already: by a thread between the endpoint and the body's own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from torch import Tensor

from fedbert_ds.config import WireSection
from fedbert_ds.errors import WireError
from fedbert_ds.server.inbox import Shapes, sender
from fedbert_ds.server.network.events import POLL_SECONDS, Event, Received
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.codecs import decode

EVENTS_AHEAD = 64
"""Decoded events that may wait for the body; beyond them they wait at the endpoint, which slows the clients down."""


class Decoding:
    """Hands events on in the order in which they come; what it decodes is checked against the plan later, by Inbox.

    `source` is the endpoint's `next_event`; a piece has at most `most_tokens` tokens.
    """

    def __init__(
        self, source: Callable[[float], Event | None], shapes: Shapes, wire: WireSection, most_tokens: int
    ) -> None:
        self._source = source
        self._shapes = shapes
        self._wire = wire
        self._most_tokens = most_tokens
        self._events: queue.Queue[Event | BaseException] = queue.Queue(EVENTS_AHEAD)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)

    def start(self) -> None:
        """From now on nobody else may take events from the source."""
        self._thread.start()

    def stop(self) -> None:
        """Take no more events; those not handed on are lost. More than once is harmless."""
        self._is_over.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def next_event(self, timeout: float) -> Event | None:
        """The oldest event, waiting up to `timeout` seconds for one. Raises what the source raised."""
        try:
            event = self._events.get(timeout=timeout) if timeout > 0 else self._events.get_nowait()
        except queue.Empty:
            return None
        if isinstance(event, BaseException):
            self._events.put_nowait(event)
            raise event
        return event

    # -- in the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._is_over.is_set():
            try:
                event = self._source(POLL_SECONDS)
            except BaseException as error:
                self._hand_on(error)
                return
            if isinstance(event, Received):
                event = replace(event, decoded=self._decode(event.client, event.message))
            if event is not None:
                self._hand_on(event)

    def _hand_on(self, event: Event | BaseException) -> None:
        while not self._is_over.is_set():
            with suppress(queue.Full):
                return self._events.put(event, timeout=POLL_SECONDS)

    def _decode(self, client: str, message: pb.ClientMessage) -> Tensor | WireError | None:
        """The tensor of a message, or why there is none; None if it has none, or one that no client may send."""
        match message.WhichOneof("body"):
            case "activations":
                frame, number = message.activations.values, message.activations.micro_batch
                codec, width, what = self._wire.activations, self._shapes.activation_width, "activations"
            case "gradient":
                frame, number = message.gradient.hidden, message.gradient.micro_batch
                codec, width, what = self._wire.gradients, self._shapes.hidden_width, "gradient"
            case _:
                return None
        shape = tuple(frame.shape)
        if len(shape) != 2 or shape[0] > self._most_tokens or shape[1] != width:
            return None
        try:
            return decode(frame, shape, codec, sender(client, what, number))
        except WireError as error:
            return error
