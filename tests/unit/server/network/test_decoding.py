"""Events on their way through the decoding thread: the same events in the same order, tensors
beside them.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from unit.server.fake_client import HALF, WIDTH

from fedbert_ds.errors import WireError
from fedbert_ds.server.contract import Contract, TensorContract
from fedbert_ds.server.network import decoding
from fedbert_ds.server.network.decoding import Decoded, Decoding, decoded
from fedbert_ds.server.network.events import Connected, Disconnected, Event, Received
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.codecs import encode
from fedbert_kernels.encoded import NAMES, Encoded

TIMEOUT = 20.0


CONTRACT = Contract(TensorContract("int8", WIDTH, 8), TensorContract("fp32", 2 * WIDTH, 8), 8, False, HALF, HALF)


class Source:
    """An endpoint's `next_event`, fed by hand."""

    def __init__(self) -> None:
        self.events: queue.SimpleQueue[Event | Exception] = queue.SimpleQueue()
        self.taken = 0

    def __call__(self, timeout: float) -> Event | None:
        try:
            event = self.events.get(timeout=timeout)
        except queue.Empty:
            return None
        self.taken += 1
        if isinstance(event, Exception):
            raise event
        return event


@contextmanager
def decoded_from(source: Source, threads: int = 1) -> Iterator[Decoding]:
    it = Decoding(source, CONTRACT, threads)
    it.start()
    try:
        yield it
    finally:
        it.stop()


def activations(rows: int, codec: str = "int8", width: int = WIDTH, value: float = 1.0) -> Received:
    frame = encode(torch.full((rows, width), value), codec, compressed=True)
    return Received("ada", pb.ClientMessage(activations=pb.Activations(micro_batch=3, values=frame)))


def test_events_stay_in_order_and_tensors_come_decoded() -> None:
    source = Source()
    gradient = pb.Gradient(hidden=encode(torch.ones(2, 2 * WIDTH), "fp32"))
    events: list[Any] = [
        Connected("ada"), activations(8), Received("ada", pb.ClientMessage(manifest=pb.Manifest(window=1))),
        Received("ada", pb.ClientMessage(gradient=gradient)), Disconnected("ada"),
    ]  # fmt: skip
    with decoded_from(source) as it:
        for event in events:
            source.events.put(event)
        got: list[Any] = [it.next_event(TIMEOUT) for _ in events]
    assert [type(event) for event in got] == [Connected, Decoded, Decoded, Decoded, Disconnected]
    assert [event.message for event in got if isinstance(event, Decoded)] == [events[k].message for k in (1, 2, 3)]
    assert torch.equal(got[1].tensor.decode(), torch.ones(8, WIDTH))
    assert torch.equal(got[3].tensor.decode(), torch.ones(2, 2 * WIDTH))
    assert got[2].tensor is None


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (activations(9), "client ada: activations of micro-batch 3: 9 rows; no piece has more than 8"),
        (activations(2, width=WIDTH + 1), "shape [2, 5] instead of [2, 4]"),
        (activations(2, "bf16"), "codec 'bf16' instead of 'int8'"),
    ],
    ids=["too many rows", "another width", "another codec"],
)
def test_what_no_piece_can_be_is_an_error_before_memory_is_taken_for_it(event: Received, reason: str) -> None:
    made: Any = decoded(event, CONTRACT)
    assert isinstance(made.tensor, WireError) and str(made.tensor).endswith(reason)


def test_a_message_without_a_tensor_has_none() -> None:
    event = Received("ada", pb.ClientMessage(leave=pb.Leave()))
    assert decoded(event, CONTRACT) == Decoded("ada", event.message, None)


def test_a_bad_tensor_is_an_error_that_travels_with_its_message() -> None:
    source = Source()
    bad = activations(2, "fp32", value=1e9)
    with decoded_from(source) as it:
        for event in (bad, activations(2)):
            source.events.put(event)
        first: Any = it.next_event(TIMEOUT)
        second: Any = it.next_event(TIMEOUT)
    assert isinstance(first.tensor, WireError)
    assert str(first.tensor).startswith("client ada: activations of micro-batch 3: ")
    assert torch.equal(second.tensor.decode(), torch.ones(2, WIDTH)), "others go on"


@pytest.mark.parametrize("kind", ["activations", "gradient"])
@pytest.mark.parametrize("codec", [name for name in NAMES if name != "int2_hadamard"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2e6])
def test_an_unsound_value_is_its_clients_fault_in_every_codec(kind: str, codec: Any, value: float) -> None:
    """The client encodes without a check of its own."""
    values = torch.full((3, WIDTH), 0.5)
    values[1, 2] = value
    coded, sound = Encoded.of(values, codec), Encoded.of(torch.full((3, WIDTH), 0.5), codec)
    form = TensorContract(codec, WIDTH, 8)
    contract = replace(CONTRACT, activations=form, gradients=form)

    def received(encoded: Encoded) -> Any:
        frame = encode(torch.zeros(3, WIDTH), codec)
        for name, part in (("payload", encoded.payload), ("scales", encoded.scales)):
            if part is not None:
                setattr(frame, name, part.view(torch.uint8).numpy().tobytes())
        if kind == "activations":
            message = pb.ClientMessage(activations=pb.Activations(micro_batch=3, values=frame))
        else:
            message = pb.ClientMessage(gradient=pb.Gradient(micro_batch=3, hidden=frame))
        made = decoded(Received("ada", message), contract)
        assert isinstance(made, Decoded)
        return made.tensor

    refusal = received(coded)
    assert isinstance(refusal, WireError) and str(refusal).startswith(f"client ada: {kind} of micro-batch 3: a value")
    assert torch.equal(received(sound).decode(), sound.decode())


def test_threads_decode_beside_each_other_and_events_stay_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first decoding ends last: it waits until all others have begun."""
    begun = [threading.Event() for _ in range(3)]
    real = decoding.decoded

    def slow(event: Any, contract: Contract, pinned: bool) -> Any:
        number = event.message.manifest.window
        begun[number].set()
        if number == 0:
            assert all(other.wait(TIMEOUT) for other in begun)
        return real(event, contract, pinned)

    monkeypatch.setattr(decoding, "decoded", slow)
    source = Source()
    with decoded_from(source, threads=2) as it:
        for number in range(3):
            source.events.put(Received("ada", pb.ClientMessage(manifest=pb.Manifest(window=number))))
        got: list[Any] = [it.next_event(TIMEOUT) for _ in range(3)]
    assert [event.message.manifest.window for event in got] == [0, 1, 2]


def test_an_event_that_is_being_decoded_is_not_waited_for_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    let_go, begun = threading.Event(), threading.Event()

    def slow(event: Any, contract: Contract, pinned: bool) -> Any:
        begun.set()
        assert let_go.wait(TIMEOUT)
        return event

    monkeypatch.setattr(decoding, "decoded", slow)
    source = Source()
    with decoded_from(source) as it:
        source.events.put(Connected("ada"))
        assert begun.wait(TIMEOUT)
        assert it.next_event(0) is None and it.next_event(0.01) is None
        let_go.set()
        assert it.next_event(TIMEOUT) == Connected("ada"), "it comes once it is decoded"


def test_codes_for_a_gpu_are_in_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    pinned: list[bool] = []

    def noted(*sizes: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        pinned.append(pin_memory)
        return empty(*sizes, **options)

    monkeypatch.setattr(torch, "empty", noted)
    for wanted in (True, False):
        made: Any = decoded(activations(2), CONTRACT, wanted)
        assert torch.equal(made.tensor.decode(), torch.ones(2, WIDTH))
    assert pinned == [True, True, False, False], "payload and scales"


def test_the_end_of_the_source_comes_out_and_stays() -> None:
    source = Source()
    with decoded_from(source) as it:
        source.events.put(Connected("ada"))
        source.events.put(WireError("the endpoint's process ended"))
        assert it.next_event(TIMEOUT) == Connected("ada")
        for _ in range(2):
            with pytest.raises(WireError, match="process ended"):
                it.next_event(TIMEOUT)


def test_what_the_body_does_not_take_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "EVENTS_AHEAD", 4)
    source = Source()
    with decoded_from(source) as it:
        for _ in range(20):
            source.events.put(activations(1))
        deadline = time.monotonic() + TIMEOUT
        while source.taken < 5:
            assert time.monotonic() < deadline
        time.sleep(0.05)
        assert source.taken == 5, "four wait, and one is held"
        for _ in range(20):
            assert isinstance(it.next_event(TIMEOUT), Decoded)
        assert it.next_event(0) is None


def test_it_ends_while_nobody_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "EVENTS_AHEAD", 1)
    source = Source()
    for _ in range(5):
        source.events.put(activations(1))
    with decoded_from(source) as it:
        pass
    assert not it.is_running
