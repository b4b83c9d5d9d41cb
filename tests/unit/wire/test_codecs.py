"""Tensor frames: exact or bounded round trips, and a refusal for every frame that is not the one
expected.
"""

from __future__ import annotations

import math
import struct
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedbert_ds.config import Codec, UpdateCodec
from fedbert_ds.errors import WireError
from fedbert_ds.wire.codecs import (
    LARGEST_VALUE,
    decode,
    decode_positions,
    decode_row_index,
    encode,
    encode_positions,
    encode_row_index,
    frame_bytes,
    from_frame,
)
from fedbert_ds.wire.compression import compress
from fedbert_ds.wire.fedbert_pb2 import TensorFrame
from fedbert_kernels.encoded import NAMES, Encoded, form
from fedbert_kernels.quantize import CODECS

SCALED = sorted(CODECS)
VALUES = st.floats(-999_000, 999_000, width=32)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """[rows, width] fp32, rows possibly 0; rows of zeros, tiny and large values among them."""
    rows, width = draw(st.integers(0, 5)), draw(st.one_of(st.integers(1, 6), st.integers(63, 130)))
    row = st.one_of(
        st.lists(VALUES, min_size=width, max_size=width),
        st.just([0.0] * width),
        st.lists(st.floats(-(2.0**-126), 2.0**-126, width=32), min_size=width, max_size=width),
    )
    return torch.tensor([draw(row) for _ in range(rows)], dtype=torch.float32).view(rows, width)


def bits(tensor: Tensor) -> list[int]:
    return tensor.view(torch.int32).flatten().tolist()


@given(tensor=tensors())
def test_fp32_is_bit_exact(tensor: Tensor) -> None:
    back = decode(encode(tensor, "fp32"), tensor.shape, "fp32", "it")
    assert back.shape == tensor.shape and back.dtype is torch.float32
    assert bits(back) == bits(tensor)  # -0.0 and subnormal numbers too


def nearest_bf16(value: float) -> float:
    """The bfloat16 next to an fp32 value, ties to even, by its bits alone."""
    (word,) = struct.unpack("<I", struct.pack("<f", value))
    low, kept = word & 0xFFFF, word >> 16
    if low > 0x8000 or (low == 0x8000 and kept & 1):
        kept += 1
    (back,) = struct.unpack("<f", struct.pack("<I", kept << 16))
    return back


@given(tensor=tensors())
def test_bf16_is_the_nearest(tensor: Tensor) -> None:
    back = decode(encode(tensor, "bf16"), tensor.shape, "bf16", "it")
    expected = torch.tensor([nearest_bf16(value) for value in tensor.flatten().tolist()]).view(tensor.shape)
    assert bits(back) == bits(expected)


@given(tensor=tensors())
def test_int8_is_within_half_a_step_of_its_row(tensor: Tensor) -> None:
    frame = encode(tensor, "int8")
    back = decode(frame, tensor.shape, "int8", "it")
    assert len(frame.payload) == tensor.numel() and len(frame.scales) == 4 * len(tensor)
    for row, got in zip(tensor.double(), back.double(), strict=True):
        largest = float(row.abs().max()) if len(row) else 0.0
        # Half a step, and fp32's own rounding of scale and product (subnormal scales are coarse).
        bound = largest / 254 * (1 + 1e-5) + 256 * 2.0**-149
        assert float((row - got).abs().max() if len(row) else 0.0) <= bound
        if largest == 0:
            assert not got.any()


WORST = {
    "int8": 1 / 254, "int8_group": 1 / 254, "fp8_e4m3": 1 / 28, "fp8_e5m2": 1 / 14, "int4_hadamard": 1 / 14,
    "int2_hadamard": 1.0,
}  # fmt: skip
"""Half a step over the largest magnitude that shares its scale; two bits cut the largest off."""


@given(codec=st.sampled_from(SCALED), tensor=tensors(), seed=st.none() | st.integers(0, 2**63 - 1))
def test_what_is_rounded_stays_within_a_step(codec: str, tensor: Tensor, seed: int | None) -> None:
    """To nearest within half a step of what shares the scale, at random within one."""
    tensor = tensor / 16  # what decodes must not pass LARGEST_VALUE either
    frame = encode(tensor, codec, seed)
    assert (len(frame.payload), len(frame.scales)) == frame_bytes(*tensor.shape, codec)
    error = (decode(frame, tensor.shape, codec, "it").double() - tensor.double()).abs()
    for columns in range(0, tensor.shape[1], 64) if CODECS[codec].grouped else (0,):
        part = slice(columns, columns + 64) if CODECS[codec].grouped else slice(None)
        largest = tensor[:, part].abs().amax(1, keepdim=True).double()
        # Rotation makes a value at most 8 times the largest; on the way back 64 errors add up, each
        # an eighth of it.
        # bf16 scales are up to 1/128 wider.
        slack = 64.0 if CODECS[codec].rotated else 1.0
        bound = largest * WORST[codec] * slack * (1 if seed is None else 2) * 1.01 + 1e-35
        assert (error[:, part] <= bound).all()


@given(codec=st.sampled_from(NAMES), tensor=tensors())
def test_compression_changes_no_bit(codec: str, tensor: Tensor) -> None:
    tensor = tensor / 16
    plain = decode(encode(tensor, codec), tensor.shape, codec, "it")
    assert bits(decode(encode(tensor, codec, compressed=True), tensor.shape, codec, "it")) == bits(plain)


@pytest.mark.parametrize("codec", NAMES)
def test_compression_takes_out_what_normal_numbers_leave_unused(codec: str) -> None:
    """Of Gaussian rows; what the entropy of their codes allows was worked out by hand for int8: 7.3
    of 8 bits.
    """
    values = torch.randn(500, 768, generator=torch.Generator().manual_seed(1))
    plain, small = (encode(values, codec, compressed=compressed).ByteSize() for compressed in (False, True))
    most = {"fp32": 0.85, "bf16": 0.69, "int8": 0.93, "int8_group": 0.96, "fp8_e4m3": 0.83, "fp8_e5m2": 0.71,
            "int2_hadamard": 0.92}  # fmt: skip
    assert 0.5 * plain < small < most.get(codec, 0.89) * plain


@pytest.mark.parametrize("codec", SCALED)
def test_a_seed_decides_every_byte(codec: str) -> None:
    tensor = torch.randn(7, 100, generator=torch.Generator().manual_seed(1))
    first, again, other = (encode(tensor, codec, seed).SerializeToString() for seed in (5, 5, 6))
    assert first == again != other
    assert encode(tensor, codec).SerializeToString() not in (first, other)


@pytest.mark.parametrize("codec", NAMES)
def test_the_run_file_knows_every_codec(codec: str) -> None:
    assert codec in get_args(UpdateCodec) and len(get_args(UpdateCodec)) == len(NAMES)
    # Two bits are for changes of weights alone.
    assert {*get_args(Codec), "int2_hadamard"} == {*get_args(UpdateCodec)}


def test_bytes_of_a_row_of_768() -> None:
    assert {name: sum(frame_bytes(1, 768, name)) for name in NAMES} == {
        "fp32": 3072, "bf16": 1536, "int8": 772, "int8_group": 792, "fp8_e4m3": 772, "fp8_e5m2": 772,
        "int4_hadamard": 408, "int2_hadamard": 216,
    }  # fmt: skip


def test_int8_by_hand() -> None:
    frame = encode(torch.tensor([[127.0, -63.4, 0.4], [0.0, 0.0, 0.0], [-2.54, 1.26, 0.001]]), "int8")
    assert list(struct.unpack("9b", frame.payload)) == [127, -63, 0, 0, 0, 0, -127, 63, 0]
    assert struct.unpack("<3f", frame.scales) == pytest.approx((1.0, 0.0, 0.02))


@pytest.mark.parametrize("codec", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_any_float_dtype_and_layout_goes_in(codec: str, dtype: torch.dtype) -> None:
    tensor = torch.arange(12, dtype=dtype).view(4, 3).T.requires_grad_()
    back = decode(encode(tensor, codec), (3, 4), codec, "it")
    torch.testing.assert_close(back, tensor.detach().float(), atol=11 * 2.1 * WORST.get(codec, 0.002), rtol=0)
    assert not back.requires_grad


@pytest.mark.parametrize("codec", NAMES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_sent(codec: str, value: float) -> None:
    with pytest.raises(WireError, match="not finite; lower optimizer"):
        encode(torch.tensor([[1.0, value]]), codec)


def test_an_unknown_codec_is_not_sent() -> None:
    with pytest.raises(WireError, match="codec 'int4' is unknown; choose one of fp32, bf16, int8"):
        encode(torch.zeros(1, 1), "int4")


# -- frames that are not the one expected ----------------------------------------------------------


def frame(codec: str, /, **changes: object) -> TensorFrame:
    """A good frame [2, 3], but for `changes`."""
    good = encode(torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.0, -0.25]]), codec)
    for name, value in changes.items():
        good.ClearField(name)
        if name == "shape":
            good.shape.extend(value)
        else:
            setattr(good, name, value)
    return good


@pytest.mark.parametrize("codec", NAMES)
@pytest.mark.parametrize("shape", [(), (2,), (3, 2), (2, 4), (1, 6), (6,), (2, 3, 1), (2**31, 2**31), (0, 3)])
def test_another_shape_is_refused(codec: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(WireError, match=r"^it: shape \["):
        decode(frame(codec, shape=shape), (2, 3), codec, "it")


@pytest.mark.parametrize("codec", NAMES)
def test_another_codec_is_refused(codec: str) -> None:
    for other in {*NAMES, "", "int4", "FP32"} - {codec}:
        with pytest.raises(WireError, match=r"^it: codec"):
            decode(frame(codec, codec=other), (2, 3), codec, "it")


@pytest.mark.parametrize("codec", NAMES)
@pytest.mark.parametrize("change", [-1, 1, 4, 1000])
def test_another_size_is_refused(codec: str, change: int) -> None:
    size = len(frame(codec).payload) + change
    with pytest.raises(WireError, match=f"^it: {size} bytes instead of"):
        decode(frame(codec, payload=bytes(size)), (2, 3), codec, "it")
    with pytest.raises(WireError, match=r"scales: \d+ bytes instead of"):
        decode(frame(codec, scales=bytes(len(frame(codec).scales) + change % 8 + 1)), (2, 3), codec, "it")


@pytest.mark.parametrize("codec", ["fp32", "bf16"])
def test_scales_where_none_belong_are_refused(codec: str) -> None:
    with pytest.raises(WireError, match="scales: 8 bytes instead of"):
        decode(frame(codec, scales=bytes(8)), (2, 3), codec, "it")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1.01 * LARGEST_VALUE, -1e9, 3.4e38])
def test_values_that_would_poison_others_are_refused(value: float) -> None:
    good = [1.0, -2.0, 3.0, 0.5, 0.0]
    for place in range(6):
        values = [*good[:place], value, *good[place:]]
        fp32 = struct.pack("<6f", *values)
        with pytest.raises(WireError, match=r"^it: a value"):
            decode(frame("fp32", payload=fp32), (2, 3), "fp32", "it")
        words = [struct.unpack("<I", struct.pack("<f", v))[0] >> 16 for v in values]
        with pytest.raises(WireError, match=r"^it: a value"):
            decode(frame("bf16", payload=struct.pack("<6H", *words)), (2, 3), "bf16", "it")
    for scales in ((value, 1.0), (1.0, value)):
        with pytest.raises(WireError, match=r"^it: a value"):
            decode(frame("int8", scales=struct.pack("<2f", *scales), payload=bytes([100] * 6)), (2, 3), "int8", "it")


def test_a_nan_scale_is_refused_even_for_a_row_of_zeros() -> None:
    with pytest.raises(WireError, match="not finite"):
        decode(frame("int8", scales=struct.pack("<2f", math.nan, 1.0), payload=bytes(6)), (2, 3), "int8", "it")


def test_the_largest_value_is_still_allowed() -> None:
    largest = torch.tensor([[LARGEST_VALUE, -LARGEST_VALUE]])
    assert decode(encode(largest, "fp32"), (1, 2), "fp32", "it").tolist() == largest.tolist()


@pytest.mark.parametrize("codec", NAMES)
def test_a_bad_frame_is_refused_before_memory_is_taken(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*arguments: object, **options: object) -> None:
        raise AssertionError("memory was taken")

    bad = [frame(codec, shape=(2**20, 2**20)), frame(codec, payload=b""), frame(codec, scales=bytes(12))]
    bad.append(frame(codec, codec="bf16" if codec != "bf16" else "fp32"))
    for name in ("frombuffer", "empty", "zeros", "tensor"):
        monkeypatch.setattr(torch, name, forbidden)
    for one in bad:
        with pytest.raises(WireError):
            decode(one, (2, 3), codec, "it")


@pytest.mark.parametrize("codec", NAMES)
def test_a_refusal_is_short_whatever_was_sent(codec: str) -> None:
    for one in (frame(codec, shape=range(100_000)), frame(codec, codec="x" * 100_000)):
        with pytest.raises(WireError) as caught:
            decode(one, (2, 3), codec, "it")
        assert len(str(caught.value)) < 300


# -- row numbers -----------------------------------------------------------------------------------


@given(rows=st.lists(st.integers(0, 70_000), max_size=50), data=st.data())
def test_row_numbers_round_trip(rows: list[int], data: st.DataObject) -> None:
    num_rows = data.draw(st.integers(max(rows, default=0) + 1, 80_000))
    payload = encode_row_index(torch.tensor(rows, dtype=torch.int32), num_rows)
    assert len(payload) == math.ceil(len(rows) * math.ceil(math.log2(num_rows)) / 8)
    back = decode_row_index(payload, len(rows), num_rows, "it")
    assert back.dtype is torch.int64 and back.tolist() == rows


def test_row_numbers_by_hand() -> None:
    assert encode_row_index(torch.tensor([0, 4, 2]), 5) == bytes([0b000_100_01, 0b0_0000000])
    assert encode_row_index(torch.tensor([0, 0, 0]), 1) == b""
    assert decode_row_index(b"", 3, 1, "it").tolist() == [0, 0, 0]


def test_row_numbers_out_of_range_are_refused() -> None:
    payload = encode_row_index(torch.tensor([0, 7, 2]), 8)
    assert decode_row_index(payload, 3, 8, "it").tolist() == [0, 7, 2]
    for num_rows in (5, 7):
        with pytest.raises(WireError, match=f"^it: a row number is not below {num_rows}"):
            decode_row_index(payload, 3, num_rows, "it")
    for num_rows, tokens, size in ((8, 2, 1), (8, 6, 3), (9, 5, 3), (1, 3, 0), (2, 99, 13)):
        with pytest.raises(WireError, match=f"^it: 2 bytes of row numbers instead of {size}"):
            decode_row_index(payload, tokens, num_rows, "it")


@settings(max_examples=200)
@given(payload=st.binary(max_size=12), tokens=st.integers(0, 30), num_rows=st.integers(1, 300))
def test_any_row_numbers_are_in_range_or_refused(payload: bytes, tokens: int, num_rows: int) -> None:
    try:
        index = decode_row_index(payload, tokens, num_rows, "it")
    except WireError:
        return
    assert index.shape == (tokens,) and all(0 <= row < num_rows for row in index.tolist())


# -- masked positions ------------------------------------------------------------------------------


@given(masked=st.lists(st.booleans(), max_size=40))
def test_positions_round_trip(masked: list[bool]) -> None:
    positions = torch.tensor(masked, dtype=torch.bool).nonzero().flatten()
    payload = encode_positions(positions, len(masked))
    assert len(payload) == math.ceil(len(masked) / 8)
    back = decode_positions(payload, len(masked), len(positions), "it")
    assert back.dtype is torch.int64 and torch.equal(back, positions)


def test_positions_by_hand() -> None:
    assert encode_positions(torch.tensor([0, 2, 9]), 11) == bytes([0b10100000, 0b01000000])


@settings(max_examples=200)
@given(payload=st.binary(max_size=5), tokens=st.integers(0, 40), masked=st.integers(0, 40))
def test_any_positions_are_good_or_refused(payload: bytes, tokens: int, masked: int) -> None:
    try:
        positions = decode_positions(payload, tokens, masked, "it")
    except WireError as error:
        assert str(error).startswith("it: ") and "masked positions instead of" in str(error)
        return
    assert len(positions) == masked and positions.tolist() == sorted(set(positions.tolist()))
    assert all(0 <= position < tokens for position in positions.tolist())


# -- anything at all -------------------------------------------------------------------------------


@settings(max_examples=300)
@given(
    codec=st.sampled_from(NAMES),
    claimed=st.one_of(st.sampled_from(NAMES), st.text(max_size=5)),
    shape=st.one_of(st.just([2, 3]), st.lists(st.integers(0, 2**32 - 1), max_size=4)),
    payload=st.one_of(st.binary(max_size=40), st.binary(min_size=6, max_size=6), st.binary(min_size=24, max_size=24)),
    scales=st.one_of(st.just(b""), st.binary(min_size=8, max_size=8), st.binary(max_size=20)),
    compressed=st.sampled_from(["no", "said to be", "yes"]),
)
def test_any_frame_is_decoded_or_refused(
    codec: str, claimed: str, shape: list[int], payload: bytes, scales: bytes, compressed: str
) -> None:
    if compressed == "yes":
        payload, scales = compress(payload, 1), compress(scales, 1)
    it = TensorFrame(codec=claimed, shape=shape, payload=payload, scales=scales, compressed=compressed != "no")
    try:
        values = decode(it, (2, 3), codec, "it")
    except WireError:
        return
    assert values.shape == (2, 3) and values.dtype is torch.float32
    assert torch.isfinite(values).all() and float(values.abs().max()) <= LARGEST_VALUE
    assert claimed == codec and shape == [2, 3]


@settings(max_examples=400)
@given(codec=st.sampled_from(NAMES), data=st.data())
def test_a_frame_is_refused_exactly_for_a_value_that_is_unsound(codec: str, data: st.DataObject) -> None:
    """What is checked are codes and scales, in place of the values that a device makes of them."""
    scale = st.one_of(
        st.floats(-(2.0**20), 2.0**20, width=32), st.sampled_from([0.0, -0.0, math.nan, math.inf, -math.inf, 1e-45])
    )
    rows, width = 2, data.draw(st.sampled_from([3, 64, 70]))
    (columns, dtype), scale_form = form(width, codec)
    num_bytes = rows * columns * dtype.itemsize
    code = st.binary(min_size=num_bytes, max_size=num_bytes)
    near = torch.tensor(data.draw(st.lists(scale, min_size=num_bytes // 2, max_size=num_bytes // 2)))
    payload = data.draw(code) if scale_form else near.to(dtype).view(torch.uint8).numpy().tobytes()[:num_bytes]
    scales = torch.empty(0)
    if scale_form:
        count = rows * scale_form[0]
        scales = torch.tensor(data.draw(st.lists(scale, min_size=count, max_size=count))).to(scale_form[1])
    it = TensorFrame(
        codec=codec, shape=(rows, width), payload=payload, scales=scales.view(torch.uint8).numpy().tobytes()
    )
    coded = torch.frombuffer(bytearray(payload), dtype=dtype).view(rows, columns)
    values = Encoded(codec, width, coded, scales.view(rows, -1) if scale_form else None).decode()
    is_sound = float(values.abs().max()) <= LARGEST_VALUE
    try:
        assert from_frame(it, (rows, width), codec, "it").decode().view(torch.int32).equal(values.view(torch.int32))
    except WireError as error:
        assert not is_sound and str(error).startswith("it: a value")
    else:
        assert is_sound


@settings(max_examples=200)
@given(codec=st.sampled_from(NAMES), compressed=st.booleans(), data=st.data())
def test_a_damaged_frame_is_decoded_or_refused(codec: str, compressed: bool, data: st.DataObject) -> None:
    """Bytes of a good frame are changed, cut or added on the wire."""
    from google.protobuf.message import DecodeError

    good = encode(torch.ones(2, 3), codec, compressed=compressed)
    wire = bytearray(good.SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(wire)))
        match data.draw(st.sampled_from(["change", "cut", "add"])):
            case "change" if place < len(wire):
                wire[place] = data.draw(st.integers(0, 255))
            case "cut":
                del wire[place:]
            case _:
                wire[place:place] = data.draw(st.binary(min_size=1, max_size=8))
    try:
        values = decode(TensorFrame.FromString(bytes(wire)), (2, 3), codec, "it")
    except (WireError, DecodeError):
        return
    assert values.shape == (2, 3) and torch.isfinite(values).all()
