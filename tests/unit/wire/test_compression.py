"""Compression is lossless, and a frame from outside costs no more than what was announced."""

from __future__ import annotations

import threading

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbert_ds.errors import WireError
from fedbert_ds.wire.compression import compress, decompress, largest_frame


@given(itemsize=st.sampled_from([1, 2, 4]), data=st.data())
def test_what_goes_in_comes_out(itemsize: int, data: st.DataObject) -> None:
    content = data.draw(st.binary(max_size=200)) * itemsize
    frame = compress(content, itemsize)
    assert decompress(frame, len(content), itemsize, "it") == content
    assert len(frame) <= largest_frame(len(content))


def test_what_cannot_be_compressed_hardly_grows() -> None:
    content = b"".join(number.to_bytes(8, "little") for number in (pow(3, k, 2**64) for k in range(50_000)))
    assert len(compress(content, 1)) <= largest_frame(len(content))


def test_planes_keep_exponents_from_being_diluted() -> None:
    """Two bytes a value, of which one is always the same: half of them cost nothing, and only when
    told apart.
    """
    content = bytes(byte for k in range(50_000) for byte in (pow(3, k, 257) & 0xFF, 63))
    assert len(compress(content, 2)) < 0.55 * len(content)


@settings(max_examples=200)
@given(frame=st.binary(max_size=60), num_bytes=st.sampled_from([0, 4, 24]))
def test_anything_else_is_refused(frame: bytes, num_bytes: int) -> None:
    try:
        content = decompress(frame, num_bytes, 4, "it")
    except WireError as error:
        assert str(error).startswith("it: ")
    else:
        assert len(content) == num_bytes


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (b"", "cannot be decompressed"),
        (compress(bytes(24), 4)[:-1], "cannot be decompressed"),
        (compress(bytes(24), 4) + b"x", "cannot be decompressed"),
        (compress(bytes(1 << 20), 4), "1048576 bytes when decompressed instead of 24"),
        # Without its size in front it could grow without end.
        (zstandard.ZstdCompressor(write_content_size=False).compress(bytes(24)), "instead of 24"),
    ],
)
def test_a_frame_that_is_not_the_one_expected(frame: bytes, reason: str) -> None:
    with pytest.raises(WireError, match=f"^it: .*{reason}"):
        decompress(frame, 24, 4, "it")


def test_a_frame_that_holds_more_than_it_says_is_refused() -> None:
    """A size of 24 in front of a megabyte: the byte after the frame's descriptor."""
    frame = bytearray(compress(bytes(24), 4))
    larger = bytearray(compress(bytes(200), 4))
    assert (frame[5], larger[5]) == (24, 200)
    larger[5] = 24
    with pytest.raises(WireError, match="cannot be decompressed"):
        decompress(bytes(larger), 24, 4, "it")


def test_threads_do_not_disturb_each_other() -> None:
    contents = [bytes([number]) * 300_000 + bytes(range(256)) * 500 for number in range(4)]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(20):
            content = contents[number]
            if decompress(compress(content, 4), len(content), 4, "it") != content:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(contents))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
