"""Client updates on the wire: sound ones round-trip, damaged ones are refused in one line."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedbert_ds.errors import WireError
from fedbert_ds.federation.client_update import (
    CHUNK_BYTES,
    Tensors,
    UpdateAssembler,
    update_chunks,
)
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.codecs import LARGEST_SUM, LARGEST_VALUE, NAMES, decode, encode, frame_bytes
from fedbert_ds.wire.compression import compress

SHAPES = {"table": (3, 4), "bias": (4,), "scale": ()}


def tensors_of_all_kinds() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=random) for name, shape in SHAPES.items()}


def chunks() -> list[pb.UpdateChunk]:
    return list(update_chunks(7, tensors_of_all_kinds().items()))


def assembler() -> UpdateAssembler:
    return UpdateAssembler(SHAPES, "client ada: its update")


def assemble(messages: list[pb.UpdateChunk]) -> Tensors | None:
    joined = assembler()
    for message in messages[:-1]:
        assert joined.add(message) is None
    return joined.add(messages[-1])


@settings(max_examples=60)
@given(
    shapes=st.dictionaries(
        st.text("abc.", min_size=1), st.lists(st.integers(1, 5), max_size=3).map(tuple), min_size=1, max_size=4
    ),
    chunk_bytes=st.integers(1, 70),
    compressed=st.booleans(),
)
def test_updates_round_trip_in_chunks_of_any_size(
    shapes: dict[str, tuple[int, ...]], chunk_bytes: int, compressed: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedbert_ds.federation.client_update.CHUNK_BYTES", chunk_bytes)
        tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
        messages = list(update_chunks(3, tensors.items(), compressed=compressed))
    assert all(message.window == 3 and len(message.payload) <= chunk_bytes for message in messages)
    assert [message.last for message in messages] == [False] * (len(messages) - 1) + [True]
    joined = UpdateAssembler(shapes, "it")
    # Whole tensors may come in any order, the parts of each in turn.
    *parts, last = messages
    for message in sorted(parts, key=lambda message: (message.offset, message.name)):
        assert joined.add(message) is None
    got = joined.add(last)
    assert got is not None and got.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert got[name].shape == tensor.shape and torch.equal(got[name], tensor)


@pytest.mark.parametrize("codec", NAMES)
def test_matrices_of_an_update_are_coded_and_nothing_else_is(codec: str) -> None:
    tensors = tensors_of_all_kinds() | {"table": torch.randn(5, 70), "cube": torch.randn(2, 3, 4)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    *parts, last = update_chunks(3, tensors.items(), codec)
    sizes = {part.name: len(part.payload) for part in parts}
    assert sizes == {"table": sum(frame_bytes(5, 70, codec)), "bias": 16, "scale": 4, "cube": 96}
    joined = UpdateAssembler(shapes, "it", codec)
    assert not any(joined.add(part) for part in parts)
    complete = joined.add(last)
    assert complete is not None
    for name, tensor in tensors.items():
        frame = encode(tensor, codec) if name == "table" else None
        expected = tensor if frame is None else decode(frame, (5, 70), codec, "it")
        assert torch.equal(complete[name], expected)


@pytest.mark.parametrize("codec", NAMES)
def test_a_compressed_update_is_the_same_update(codec: str) -> None:
    tensors = tensors_of_all_kinds() | {"table": torch.randn(50, 70), "untouched": torch.zeros(4, 6)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    updates, sizes = [], []
    for compressed in (False, True):
        joined = UpdateAssembler(shapes, "it", codec)
        chunks = list(update_chunks(3, tensors.items(), codec, compressed=compressed))
        sizes.append(sum(chunk.ByteSize() for chunk in chunks))
        updates.append([joined.add(chunk) for chunk in chunks][-1])
    plain, same = updates
    assert all(torch.equal(plain[name], same[name]) for name in shapes) and sizes[1] < sizes[0]


def test_a_compressed_update_longer_or_larger_than_it_may_be_is_refused() -> None:
    first, last = update_chunks(0, [("table", torch.ones(3, 4))], compressed=True)
    joined = UpdateAssembler({"table": (3, 4)}, "it")
    assert joined.add(first) is None
    with pytest.raises(WireError, match="chunk of 'table' at byte"):
        joined.add(pb.UpdateChunk(name="table", shape=(3, 4), offset=len(first.payload), payload=bytes(2000)))
    first.payload = compress(bytes(1 << 20), 4)
    joined = UpdateAssembler({"table": (3, 4)}, "it")
    assert joined.add(first) is None
    with pytest.raises(WireError, match="1048576 bytes when decompressed instead of 48"):
        joined.add(last)


@settings(max_examples=60)
@given(touched=st.lists(st.booleans(), min_size=1, max_size=40), codec=st.sampled_from(NAMES))
def test_rows_of_zeros_are_not_sent(touched: list[bool], codec: str) -> None:
    table = torch.randn(len(touched), 6) * torch.tensor(touched)[:, None]
    first, *others = update_chunks(0, [("table", table), ("bias", torch.zeros(3))], codec)
    assert len(first.payload) == sum(frame_bytes(sum(touched), 6, codec))
    assert len(first.rows) == (0 if all(touched) else -(-len(touched) // 8))
    joined = UpdateAssembler({"table": (len(touched), 6), "bias": (3,)}, "it", codec)
    results = [joined.add(chunk) for chunk in (first, *others)]
    assert results[-1] is not None
    got = results[-1]["table"]
    sent = torch.tensor(touched)
    assert torch.equal(got[sent], decode(encode(table[sent], codec), (sum(touched), 6), codec, "it"))
    assert not got[~sent].any()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rows": b"\xa0\xa0"}, r"2 bytes of rows for tensor 'table' of shape \[3, 4\]"),
        ({"rows": b"\x80"}, "chunk of 'table' at byte 0 was not expected"),
        ({"rows": b"\xe0", "payload": b""}, "chunk of 'table' at byte 0 was not expected"),
    ],
)
def test_rows_that_do_not_fit_their_payload(changes: dict[str, bytes], reason: str) -> None:
    table = torch.ones(3, 4)
    table[1] = 0.0
    first, _ = update_chunks(0, [("table", table)])
    for name, value in changes.items():
        setattr(first, name, value)
    with pytest.raises(WireError, match=reason):
        UpdateAssembler({"table": (3, 4)}, "it").add(first)


def test_a_coded_update_that_is_not_finite_is_neither_sent_nor_taken() -> None:
    table = torch.tensor([[1.0, math.nan]])
    with pytest.raises(WireError, match="not finite"):
        list(update_chunks(0, [("table", table)], "int8"))
    first, last = update_chunks(0, [("table", torch.ones(1, 2))], "int8")
    first.payload = first.payload[:2] + struct.pack("<f", math.inf)
    joined = UpdateAssembler({"table": (1, 2)}, "client ada: its update", "int8")
    assert joined.add(first) is None
    with pytest.raises(WireError, match=r"^client ada: its update: tensor 'table': a value is not finite"):
        joined.add(last)


def test_an_update_in_another_codec_is_refused() -> None:
    (first, *_) = update_chunks(0, [("table", torch.ones(3, 4))])
    with pytest.raises(WireError, match="chunk of 'table' at byte 0 was not expected"):
        UpdateAssembler(SHAPES, "it", "int8").add(first)


def test_a_chunk_is_at_most_a_megabyte() -> None:
    large = torch.zeros(CHUNK_BYTES // 4 + 1)
    sizes = [len(message.payload) for message in update_chunks(0, [("large", large)])]
    assert sizes == [CHUNK_BYTES, 4, 0]


def test_updates_of_other_dtypes_and_layouts_travel_as_fp32() -> None:
    tensor = torch.arange(12, dtype=torch.bfloat16).view(4, 3).T.requires_grad_()
    result = UpdateAssembler({"it": (3, 4)}, "it")
    first, last = update_chunks(0, [("it", tensor)])
    assert result.add(first) is None
    complete = result.add(last)
    assert complete is not None and torch.equal(complete["it"], tensor.detach().float())


def changed(place: int, **changes: object) -> list[pb.UpdateChunk]:
    """Good chunks but for one."""
    messages = chunks()
    for name, value in changes.items():
        messages[place].ClearField(name)
        if name == "shape":
            messages[place].shape.extend(value)
        else:
            setattr(messages[place], name, value)
    return messages


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (chunks()[:1] + chunks()[2:], "tensor 'bias' did not arrive whole"),
        (chunks()[-1:], "tensor 'table' did not arrive whole"),
        (changed(0, payload=bytes(44)), "tensor 'table' did not arrive whole"),
        (changed(0, payload=bytes(52)), "chunk of 'table' at byte 0 was not expected"),
        (changed(0, payload=b""), "chunk of 'table' at byte 0 was not expected"),
        (changed(0, offset=4), "chunk of 'table' at byte 4 was not expected"),
        (changed(0, offset=2**63), "chunk of 'table' at byte 9223372036854775808 was not expected"),
        (chunks()[:1] + chunks(), "chunk of 'table' at byte 0 was not expected"),
        (changed(1, name="bia"), r"tensor 'bia' of shape \[4\] was not expected"),
        (changed(1, name=""), r"tensor '' of shape \[4\] was not expected"),
        (changed(0, shape=[4, 3]), r"tensor 'table' of shape \[4, 3\] was not expected"),
        (changed(0, shape=[12]), r"tensor 'table' of shape \[12\] was not expected"),
        (changed(2, shape=[1]), r"tensor 'scale' of shape \[1\] was not expected"),
        (changed(2, payload=struct.pack("<f", math.nan)), "tensor 'scale' holds nan"),
        (changed(2, payload=struct.pack("<f", -math.inf)), "tensor 'scale' holds inf"),
        (changed(2, payload=struct.pack("<f", 1.1 * LARGEST_VALUE)), r"tensor 'scale' holds 1\.1e\+06"),
    ],
)
def test_an_update_that_is_not_the_one_expected(messages: list[pb.UpdateChunk], reason: str) -> None:
    with pytest.raises(WireError, match=f"^client ada: its update: {reason}"):
        assemble(messages)


def test_a_refusal_is_short_whatever_was_sent() -> None:
    for message in (changed(0, name="x" * 100_000)[0], changed(0, shape=range(100_000))[0]):
        with pytest.raises(WireError) as caught:
            assembler().add(message)
        assert len(str(caught.value)) < 300


@settings(max_examples=200)
@given(data=st.data())
def test_damaged_chunks_are_joined_or_refused(data: st.DataObject) -> None:
    """Chunks dropped, doubled, swapped, or with bytes changed."""
    messages = chunks()
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.integers(0, len(messages) - 1))
        match data.draw(st.sampled_from(["drop", "double", "swap", "change"])):
            case "drop" if len(messages) > 1:
                del messages[place]
            case "double":
                messages.insert(place, messages[place])
            case "swap":
                messages[place], messages[0] = messages[0], messages[place]
            case _:
                wire = bytearray(messages[place].SerializeToString())
                wire[data.draw(st.integers(0, len(wire) - 1))] = data.draw(st.integers(0, 255))
                try:
                    messages[place] = pb.UpdateChunk.FromString(bytes(wire))
                except DecodeError:
                    return
    joined = assembler()
    try:
        for message in messages:
            tensors = joined.add(message)
            if tensors is not None:
                assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == SHAPES
                assert all(float(tensor.abs().max()) <= LARGEST_VALUE for tensor in tensors.values())
    except WireError:
        return


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8"])
def test_clients_take_the_sum_of_what_ranks_take_of_many(codec: str) -> None:
    """A limit for one client's update would let it make the others quit."""
    most = torch.full((2, 4), 1e6)
    for count, largest, is_taken in ((1, LARGEST_VALUE, True), (3, LARGEST_VALUE, False), (1000, LARGEST_SUM, True)):
        assembler = UpdateAssembler({"table": (2, 4)}, "an update", codec, largest)
        chunks = list(update_chunks(0, [("table", count * most)], codec))
        if is_taken:
            update = None
            for chunk in chunks:
                update = assembler.add(chunk)
            assert update is not None and float(update["table"].max()) == pytest.approx(count * 1e6, rel=0.01)
        else:
            with pytest.raises(WireError, match=r"e\+06"):
                for chunk in chunks:
                    assembler.add(chunk)
