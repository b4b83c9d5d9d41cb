"""The reference as bytes: it comes back to the bit, in chunks, and anything else is refused in one
line.
"""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedbert_ds.errors import WireError
from fedbert_ds.federation.reference import (
    CHUNK_BYTES,
    Reference,
    ReferenceAssembler,
    from_bytes,
    reference_chunks,
    to_bytes,
)
from fedbert_ds.wire import fedbert_pb2 as pb

SHAPES = {"a/table": (3, 4), "bias": (2,)}


def reference(version: int = 5) -> Reference:
    weights = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    optimizer = {
        "a/table": {"step": torch.tensor(5.0), "exp_avg": torch.randn(3, 4)},
        "bias": {"step": 5, "exp_avg": torch.randn(2)},
    }
    return Reference(version, weights, optimizer)


def test_it_comes_back_to_the_bit() -> None:
    one = reference()
    other, notes = from_bytes(to_bytes(one, {"cursors": {"ada": 1}}), SHAPES)
    assert other.version == 5 and notes == {"cursors": {"ada": 1}}
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in SHAPES)
    assert torch.equal(other.optimizer["a/table"]["step"], torch.tensor(5.0)) and other.optimizer["bias"]["step"] == 5
    for name in SHAPES:
        assert torch.equal(one.optimizer[name]["exp_avg"], other.optimizer[name]["exp_avg"])


def test_messages_are_small_and_notes_stay_at_home() -> None:
    shapes = {"table": (700, 1000)}
    weights = {"table": torch.randn(700, 1000)}
    messages = list(reference_chunks(to_bytes(Reference(0, weights))))
    assert len(messages) == 3 and all(len(message.reference.payload) <= CHUNK_BYTES for message in messages)
    assembler = ReferenceAssembler(shapes)
    *first, last = (assembler.add(message.reference) for message in messages)
    assert first == [None, None] and last is not None
    assert torch.equal(last.weights["table"], weights["table"]) and last.optimizer == {}


def packed(tensors: dict[str, torch.Tensor], **facts: object) -> bytes:
    full = {"version": 1, "numbers": {}, "notes": {}} | facts
    return safetensors.torch.save(tensors, {"reference": json.dumps(full)})


WEIGHTS = {f"weights/{name}": torch.zeros(shape) for name, shape in SHAPES.items()}
WRONG = {
    "nothing": b"",
    "no safetensors": b"{}" * 50,
    "a header out of all measure": (1 << 40).to_bytes(8, "little"),
    "no metadata": safetensors.torch.save(WEIGHTS),
    "a tensor is missing": packed({"weights/bias": torch.zeros(2)}),
    "another shape": packed(WEIGHTS | {"weights/bias": torch.zeros(3)}),
    "a kind that is unknown": packed(WEIGHTS | {"gradients/bias": torch.zeros(2)}),
    "another tensor": packed(WEIGHTS | {"weights/more": torch.zeros(3)}),
    "a moment of another shape": packed(WEIGHTS | {"optimizer/exp_avg/bias": torch.zeros(3)}),
    "a moment of nothing": packed(WEIGHTS, numbers={"more": {"step": 3}}),
    "numbers that are a list": packed(WEIGHTS, numbers=[1]),
    "weights of another type": packed(WEIGHTS | {"weights/bias": torch.zeros(2, dtype=torch.int64)}),
    "NaN": packed(WEIGHTS | {"weights/bias": torch.tensor([0.0, float("nan")])}),
}


@pytest.mark.parametrize("name", WRONG)
def test_anything_else_is_refused(name: str) -> None:
    with pytest.raises(WireError, match="the server's reference client model") as caught:
        ReferenceAssembler(SHAPES).add(pb.ReferenceChunk(payload=WRONG[name], last=True))
    assert "\n" not in str(caught.value)


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_else(data: bytes) -> None:
    with pytest.raises(WireError):
        ReferenceAssembler(SHAPES).add(pb.ReferenceChunk(payload=data, last=True))


def test_it_ends_before_memory_does() -> None:
    header_without_end = (1 << 40).to_bytes(8, "little")
    more_moments = {f"optimizer/{number}/bias": torch.zeros(2) for number in range(30)}
    for beginning in (header_without_end, packed(WEIGHTS), packed(WEIGHTS | more_moments)):
        assembler = ReferenceAssembler(SHAPES)
        with pytest.raises(WireError, match="larger than the client model can be"):
            for _ in range(2):
                assembler.add(pb.ReferenceChunk(payload=beginning))


@pytest.mark.parametrize("chunk_bytes", [1, 7, 64, 1000])
def test_chunks_of_any_size_join(chunk_bytes: int) -> None:
    one = reference()
    data = to_bytes(one)
    assembler = ReferenceAssembler(SHAPES)
    starts = range(0, len(data), chunk_bytes)
    results = [
        assembler.add(pb.ReferenceChunk(payload=data[start : start + chunk_bytes], last=start == starts[-1]))
        for start in starts
    ]
    assert results[:-1] == [None] * (len(starts) - 1)
    assert results[-1] is not None
    assert to_bytes(results[-1]) == data


def test_a_file_cut_short_is_refused() -> None:
    data = to_bytes(reference())
    for end in (4, 20, len(data) - 1):
        with pytest.raises(WireError, match="ends too early"):
            ReferenceAssembler(SHAPES).add(pb.ReferenceChunk(payload=data[:end], last=True))
