"""A rank's events with codes in place of bytes: threads decompress and check them."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass

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
    Knocked,
    Received,
)
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.codecs import from_frame
from fedbert_kernels.encoded import Encoded

EVENTS_AHEAD = 64
"""Decoded events that may wait for the body. More wait at the endpoint and slow clients down."""


@dataclass(frozen=True)
class Decoded:
    """A message of a connected client and its tensor."""

    client: str
    message: pb.ClientMessage
    tensor: Encoded | WireError | None
    """[rows, width], or what is wrong with it; None for a message without a tensor."""
    session: str = ""


DecodedEvent = JoinAsked | JoinAbandoned | Connected | Decoded | Detached | Attached | Disconnected | Knocked


def decoded(event: Event, contract: Contract, pinned: bool = False) -> DecodedEvent:
    """The event, its message's tensor decompressed, in `pinned` memory for a GPU.

    A bad tensor travels on as a WireError.
    """
    if not isinstance(event, Received):
        return event
    tensor = _tensor(event.client, event.message, contract, pinned)
    return Decoded(event.client, event.message, tensor, event.session)


def sender(client: str, what: str, micro_batch: int) -> str:
    """The sender of a tensor, for an error message."""
    return f"client {client}: {what} of micro-batch {micro_batch}"


class Decoding:
    """Hands an endpoint's events on, in order and decoded. A thread takes them; `threads` others
    decode, into `pinned` memory for a GPU.

    `source` is the endpoint's `next_event`. After `start` nobody else may take events from it.
    """

    def __init__(
        self, source: Callable[[float], Event | None], contract: Contract, threads: int = 1, pinned: bool = False
    ) -> None:
        self._source = source
        self._contract = contract
        self._pinned = pinned
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decoding")
        self._events: queue.Queue[Future[DecodedEvent]] = queue.Queue(EVENTS_AHEAD)
        self._oldest: Future[DecodedEvent] | None = None
        """Taken from the queue and not handed on; an error stays here."""
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Take no more events; those not handed on are lost. Further calls do nothing."""
        self._is_over.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)
        self._pool.shutdown(wait=False, cancel_futures=True)

    @property
    def is_running(self) -> bool:
        """Whether the thread still takes events."""
        return self._thread.is_alive()

    def next_event(self, timeout: float) -> DecodedEvent | None:
        """The oldest event, waiting up to `timeout` seconds. Raises what the source raised."""
        ends = time.monotonic() + timeout
        if self._oldest is None:
            try:
                self._oldest = self._events.get(timeout=timeout) if timeout > 0 else self._events.get_nowait()
            except queue.Empty:
                return None
        if not self._oldest.done():
            wait([self._oldest], max(0.0, ends - time.monotonic()))
            if not self._oldest.done():
                return None
        event = self._oldest.result()
        self._oldest = None
        return event

    # -- in the thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._is_over.is_set():
            try:
                event = self._source(POLL_SECONDS)
                if event is not None:
                    self._hand_on(self._pool.submit(decoded, event, self._contract, self._pinned))
            except BaseException as error:
                failed: Future[DecodedEvent] = Future()
                failed.set_exception(error)
                return self._hand_on(failed)

    def _hand_on(self, event: Future[DecodedEvent]) -> None:
        while not self._is_over.is_set():
            with suppress(queue.Full):
                return self._events.put(event, timeout=POLL_SECONDS)


def _tensor(client: str, message: pb.ClientMessage, contract: Contract, pinned: bool) -> Encoded | WireError | None:
    match message.WhichOneof("body"):
        case "activations":
            frame, micro_batch = message.activations.values, message.activations.micro_batch
            return _encoded(frame, contract.activations, sender(client, "activations", micro_batch), pinned)
        case "gradient":
            frame, micro_batch = message.gradient.hidden, message.gradient.micro_batch
            return _encoded(frame, contract.gradients, sender(client, "gradient", micro_batch), pinned)
    return None


def _encoded(frame: pb.TensorFrame, contract: TensorContract, who: str, pinned: bool) -> Encoded | WireError:
    rows = frame.shape[0] if len(frame.shape) == 2 else 0
    if rows > contract.most_rows:
        # Before memory is taken for it; the plan knows a smaller number still.
        return WireError(f"{who}: {rows} rows; no piece has more than {contract.most_rows}")
    try:
        encoded = from_frame(frame, (rows, contract.width), contract.codec, who, pinned=pinned)
    except WireError as error:
        return error
    # Looked at here, so that the rank does not have to: how much it may count for.
    _ = encoded.norm if contract.is_gradient else encoded.row_sizes
    return encoded
