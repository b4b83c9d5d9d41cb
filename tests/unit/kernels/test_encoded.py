"""Encoded tensors: rows join and split as their values do, and a bound is never below a value."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbert_kernels.encoded import NAMES, UNSCALED, Encoded, form
from fedbert_kernels.quantize import CODECS


def values(rows: int, width: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 3


def equal(one: Encoded, other: Encoded) -> bool:
    same_scales = one.scales is other.scales or torch.equal(one.scales, other.scales)  # type: ignore[arg-type]
    one_payload, other_payload = (part.payload.reshape(-1).view(torch.uint8) for part in (one, other))
    same_payload = one.payload.shape == other.payload.shape and torch.equal(one_payload, other_payload)
    return (one.codec, one.width) == (other.codec, other.width) and same_payload and same_scales


@settings(max_examples=40)
@given(
    codec=st.sampled_from(NAMES),
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    width=st.sampled_from([1, 3, 64, 70]),
)
def test_rows_are_coded_apart(codec: str, lengths: list[int], width: int) -> None:
    """Coded together and split, or coded one by one and joined: the same bits."""
    whole = values(sum(lengths), width)
    parts = [Encoded.of(part, codec) for part in whole.split(lengths)]
    together = Encoded.of(whole, codec)
    assert equal(Encoded.join(parts), together)
    assert all(equal(one, other) for one, other in zip(together.split(lengths), parts, strict=True))
    assert [len(part) for part in parts] == lengths


@pytest.mark.parametrize("codec", NAMES)
@pytest.mark.parametrize("width", [1, 64, 100])
def test_the_form_is_that_of_what_is_encoded(codec: str, width: int) -> None:
    encoded, (payload, scales) = Encoded.of(values(5, width), codec), form(width, codec)
    assert (encoded.payload.shape, encoded.payload.dtype) == ((5, payload[0]), payload[1])
    if scales is None:
        assert encoded.scales is None and codec in UNSCALED
    else:
        assert encoded.scales is not None
        assert (encoded.scales.shape, encoded.scales.dtype) == ((5, scales[0]), scales[1])


@pytest.mark.parametrize("codec", NAMES)
def test_zeros_are_zeros(codec: str) -> None:
    zeros = Encoded.zeros(3, 70, codec)
    assert zeros.decode().shape == (3, 70) and not zeros.decode().any() and zeros.bound == 0.0
    assert len(Encoded.join([Encoded.zeros(0, 70, codec), Encoded.of(values(2, 70), codec)])) == 2


@pytest.mark.parametrize("codec", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_body_in_bf16_codes_what_it_would_in_fp32(codec: str, dtype: torch.dtype) -> None:
    result = values(6, 70).to(dtype)
    assert equal(Encoded.of(result, codec), Encoded.of(result.float(), codec))


@settings(max_examples=60)
@given(codec=st.sampled_from(NAMES), data=st.data())
def test_no_value_is_above_the_bound(codec: str, data: st.DataObject) -> None:
    """Of any codes and scales that a client may send; where the bound is finite, all values are."""
    width, rows = 70, 2
    parts = []
    for part in form(width, codec):
        if part is not None:
            num_bytes = rows * part[0] * part[1].itemsize
            content = data.draw(st.binary(min_size=num_bytes, max_size=num_bytes))
            parts.append(torch.frombuffer(bytearray(content), dtype=part[1]).view(rows, part[0]))
    encoded = Encoded(codec, width, parts[0], parts[1] if len(parts) > 1 else None)
    largest = float(encoded.decode().double().abs().max())
    if math.isfinite(encoded.bound):
        assert largest <= encoded.bound


@pytest.mark.parametrize("codec", NAMES)
def test_a_sane_tensor_is_not_decoded_to_be_checked(codec: str) -> None:
    """The bound is near enough for values a million times below the largest that is allowed."""
    largest = float(values(8, 128).abs().max())
    assert largest <= Encoded.of(values(8, 128), codec).bound * 1.01 <= 100 * largest


@pytest.mark.parametrize("codec", NAMES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows(codec: str, value: float) -> None:
    bad = values(3, 70)
    bad[1, 69] = value
    assert not Encoded.of(bad, codec).is_finite and Encoded.of(values(3, 70), codec).is_finite


@pytest.mark.parametrize("codec", [name for name, it in CODECS.items() if it.mantissa_bits])
def test_a_code_of_infinity_or_nan_has_no_bound(codec: str) -> None:
    for code in (0x7F, 0xFF) if codec == "fp8_e4m3" else (0x7C, 0x7D, 0x7F, 0xFC, 0xFF):
        encoded = Encoded.of(values(3, 70), codec)
        encoded.payload.view(torch.uint8)[2, 5] = code
        assert not math.isfinite(encoded.bound)
