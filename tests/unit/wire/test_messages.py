"""Manifests, settings and cuts: good ones round-trip, anything else is a WireError."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbert_ds.config import LayersCut, RunConfig, SequenceSection
from fedbert_ds.errors import WireError
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.messages import (
    Manifest,
    checked_manifest,
    client_settings,
    cursor_numbers,
    cut_to_json,
    parse_cut,
    parse_settings,
)

UINT32 = st.integers(0, 2**32 - 1)


# -- manifests -------------------------------------------------------------------------------------


def test_a_good_manifest() -> None:
    message = pb.Manifest(window=7, lengths=[3, 8, 1], masked=[0, 8, 1])
    assert checked_manifest("ada", message, max_sequence=8, max_tokens=12) == Manifest("ada", 7, (3, 8, 1), (0, 8, 1))


@pytest.mark.parametrize(
    ("lengths", "masked", "reason"),
    [
        ([], [], "0 lengths and 0 masked counts"),
        ([3], [], "1 lengths and 0 masked counts"),
        ([3], [1, 1], "1 lengths and 2 masked counts"),
        ([3, 0], [1, 0], "a sequence without tokens"),
        ([9], [1], "a sequence of 9 tokens; data.sequence_length is 8"),
        ([2**32 - 1], [1], "a sequence of 4294967295 tokens"),
        ([3, 4], [3, 5], "more masked tokens than tokens"),
        ([8, 5], [1, 1], "13 tokens instead of at most 12"),
        ([1] * 13, [0] * 13, "13 lengths and 13 masked counts for 12 tokens"),
    ],
)
def test_an_impossible_manifest(lengths: list[int], masked: list[int], reason: str) -> None:
    message = pb.Manifest(window=7, lengths=lengths, masked=masked)
    with pytest.raises(WireError, match=f"^client ada: manifest of window 7: {reason}"):
        checked_manifest("ada", message, max_sequence=8, max_tokens=12)


def test_one_sequence_may_overshoot_the_share() -> None:
    message = pb.Manifest(lengths=[8], masked=[1])
    assert checked_manifest("ada", message, max_sequence=8, max_tokens=1).lengths == (8,)


@pytest.mark.parametrize(("position", "sequences"), [(1, 0), (8, 7), (2**64 - 1, 7)])
def test_a_cursor_behind_the_end_of_the_text_is_refused(position: int, sequences: int) -> None:
    cursor = pb.Cursor(position=position, sequences=sequences)
    message = pb.Manifest(window=7, lengths=[8], masked=[1], cursor=cursor)
    reason = f"manifest of window 7: a cursor at sequence {position} of {sequences}$"
    with pytest.raises(WireError, match=reason):
        checked_manifest("ada", message, max_sequence=8, max_tokens=12)
    message.cursor.position = sequences
    assert checked_manifest("ada", message, max_sequence=8, max_tokens=12).window == 7
    assert cursor_numbers(message.cursor) == {"epoch": 0, "position": sequences, "sequences": sequences}


@settings(max_examples=200)
@given(
    lengths=st.lists(st.integers(0, 12) | UINT32, max_size=6),
    masked=st.lists(st.integers(0, 12) | UINT32, max_size=6),
    max_sequence=st.integers(1, 10),
    max_tokens=st.integers(1, 30),
)
def test_any_manifest_is_good_or_refused(
    lengths: list[int], masked: list[int], max_sequence: int, max_tokens: int
) -> None:
    try:
        checked = checked_manifest("ada", pb.Manifest(lengths=lengths, masked=masked), max_sequence, max_tokens)
    except WireError:
        return
    assert list(checked.lengths) == lengths and list(checked.masked) == masked
    assert lengths and all(1 <= length <= max_sequence for length in lengths)
    assert all(count <= length for count, length in zip(masked, lengths, strict=True))
    assert sum(lengths) <= max(max_tokens, max_sequence)


def test_a_huge_manifest_is_refused_before_it_is_read() -> None:
    class Endless:
        """A repeated field that must not be gone through."""

        def __len__(self) -> int:
            return 10**9

    class Message:
        window, lengths, masked = 0, Endless(), Endless()

    with pytest.raises(WireError, match="1000000000 lengths"):
        checked_manifest("ada", Message(), max_sequence=8, max_tokens=12)  # type: ignore[arg-type]


# -- settings and cut ------------------------------------------------------------------------------

CONFIG = RunConfig(
    run={"windows": 10, "seed": 3},
    data={"sequence_length": 64, "mask_probability": 0.2, "whole_word": True, "source": ["private.txt"]},
    optimizer={"lr": 3e-3, "betas": (0.8, 0.99)},
    federation={"mode": "parallel"},
    wire={"activations": "int8"},
)
SETTINGS = client_settings(CONFIG.run, CONFIG.data, CONFIG.optimizer, CONFIG.federation, CONFIG.wire, tokens=512)


def test_settings_are_the_run_files() -> None:
    assert (SETTINGS.seed, SETTINGS.windows, SETTINGS.tokens) == (3, 10, 512)
    assert SETTINGS.sequences == SequenceSection(sequence_length=64, mask_probability=0.2, whole_word=True)
    assert (SETTINGS.optimizer, SETTINGS.federation, SETTINGS.wire) == (
        CONFIG.optimizer,
        CONFIG.federation,
        CONFIG.wire,
    )


def test_nothing_else_of_the_data_section_travels() -> None:
    assert set(SETTINGS.sequences.model_dump()) == {"sequence_length", "mask_probability", "whole_word"}
    assert "private.txt" not in SETTINGS.model_dump_json()


def test_settings_round_trip() -> None:
    assert parse_settings(SETTINGS.model_dump_json()) == SETTINGS


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "{}", "{", '{"seed": 1}', SETTINGS.model_dump_json().replace("windows", "rounds"),
     SETTINGS.model_dump_json()[:-1] + ', "surprise": 1}', SETTINGS.model_dump_json().replace("int8", "int3"),
     "[" * 100_000],
    ids=lambda text: text[:12],
)  # fmt: skip
def test_settings_of_another_version_are_one_line(text: str) -> None:
    with pytest.raises(WireError, match=r"^the server's settings are not understood \(") as caught:
        parse_settings(text)
    assert len(str(caught.value)) < 300


@given(text=st.text(max_size=30))
def test_any_text_is_settings_or_refused(text: str) -> None:
    with pytest.raises(WireError):
        parse_settings(text)


@pytest.mark.parametrize("cut", ["embeddings", "rows", LayersCut(layers=3)])
def test_cuts_round_trip(cut: str | LayersCut) -> None:
    assert parse_cut(cut_to_json(cut)) == cut


@pytest.mark.parametrize("text", ["", "embeddings", '"heads"', '{"layers": 0}', '{"layers": 1, "x": 2}', "3", "{}"])
def test_a_cut_of_another_version_is_one_line(text: str) -> None:
    with pytest.raises(WireError, match=r"is not understood; install the same fedbert-ds on both$"):
        parse_cut(text)
