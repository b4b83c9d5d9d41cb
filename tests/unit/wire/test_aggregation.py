"""What ranks and an aggregator of another party know each other by."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedbert_ds.errors import ConfigError
from fedbert_ds.wire.aggregation import is_secret, rank_name, read_secret


def test_a_secret_is_a_files_content_without_its_line_end(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("0123456789abcdef\n")
    secret = read_secret(tmp_path / "secret")
    assert secret == "0123456789abcdef"
    assert is_secret("0123456789abcdef", secret)
    assert not is_secret("0123456789abcdeF", secret) and not is_secret("", secret) and not is_secret("é", secret)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"\xff" * 20, "cannot be read"),
        (b" \n", "holds 0 characters"),
        (b"short", "at least 16"),
    ],
)
def test_a_file_without_a_secret_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "secret").write_bytes(content)
    with pytest.raises(ConfigError, match=f"^aggregator.secret: .*{message}"):
        read_secret(tmp_path / "secret")


def test_no_client_can_have_a_ranks_name() -> None:
    assert len({rank_name(rank) for rank in range(12)}) == 12
    assert not any(rank_name(rank).isprintable() for rank in range(12))
