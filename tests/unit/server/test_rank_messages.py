"""What ranks tell each other comes back as it was, or is refused before it is read."""

from __future__ import annotations

import hmac
import pickle
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbert_ds.errors import WireError
from fedbert_ds.server.rank_messages import SECRET, RankMessages, RankSecret


@dataclass(frozen=True)
class Inner:
    numbers: tuple[float, ...] = ()
    names: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Outer:
    data: bytes
    by_name: Mapping[str, Inner]
    by_number: dict[int, bool] = field(default_factory=dict)
    maybe: Inner | None = None


inner = st.builds(
    Inner,
    st.lists(st.floats(allow_nan=False), max_size=4).map(tuple),
    st.frozensets(st.text(max_size=8), max_size=4),
)
outer = st.builds(
    Outer,
    st.binary(max_size=40),
    st.dictionaries(st.text(max_size=8), inner, max_size=3),
    st.dictionaries(st.integers(-(2**63), 2**63 - 1), st.booleans(), max_size=3),
    st.none() | inner,
)


@given(outer, st.integers(0, 7))
def test_a_value_comes_back_as_it_was(value: Outer, sender: int) -> None:
    """To the last bit of a float."""
    messages = RankMessages(b"secret")
    assert messages.unpack(messages.pack(value, Outer, sender), Outer, sender) == value
    pair = (value, None, frozenset({sender}))
    kind = tuple[Outer, None, frozenset[int]]
    assert messages.unpack(messages.pack(pair, kind, sender), kind, sender) == pair


@given(st.binary(max_size=80))
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(WireError, match="what came as rank 3's is not of a rank of this run"):
        RankMessages(b"secret").unpack(data, Outer, 3)


@given(st.data())
def test_a_message_with_one_bit_changed_is_refused(data: st.DataObject) -> None:
    messages = RankMessages(b"secret")
    message = bytearray(messages.pack(Outer(b"x", {}), Outer, 0))
    bit = data.draw(st.integers(0, 8 * len(message) - 1))
    message[bit // 8] ^= 1 << bit % 8
    with pytest.raises(WireError, match="signature"):
        messages.unpack(bytes(message), Outer, 0)


def test_a_message_counts_once_and_as_its_sender_s() -> None:
    messages = RankMessages(b"secret")
    message = messages.pack(7, int, 1)
    assert messages.unpack(message, int, 1) == 7
    with pytest.raises(WireError):
        messages.unpack(message, int, 2)
    messages.begin()
    with pytest.raises(WireError):
        messages.unpack(message, int, 1)
    with pytest.raises(WireError):
        RankMessages(b"another").unpack(RankMessages(b"secret").pack(7, int, 1), int, 1)


@pytest.mark.parametrize(("value", "kind"), [("seven", str), ([1, 2], list[int]), (None, None), (b"\xff", bytes)])
def test_a_value_of_another_type_is_one_line(value: Any, kind: Any) -> None:
    """Ranks of two versions."""
    messages = RankMessages(b"secret")
    with pytest.raises(WireError, match="rank 0 said something else than was due; install the same version") as caught:
        messages.unpack(messages.pack(value, kind, 0), Outer, 0)
    assert "\n" not in str(caught.value)


def test_code_of_a_rank_that_knows_the_secret_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "owned",))

    messages = RankMessages(b"secret")
    forged = pickle.dumps(Evil())
    with pytest.raises(WireError, match="something else"):
        messages.unpack(hmac.digest(b"secret", b"0 0 " + forged, "sha256") + forged, Outer, 0)
    assert not (tmp_path / "owned").exists()


def test_a_secret_is_drawn_anew_for_each_start_and_only_its_user_may_read_it(tmp_path: Path) -> None:
    found = set()
    for _ in range(3):
        secret = RankSecret(tmp_path / "runs" / "run", {})
        secret.offer()
        [file] = (tmp_path / "runs").iterdir()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        found.add(RankSecret(tmp_path / "runs" / "run", {}).read())
        secret.remove()
        assert not file.exists()
    assert len(found) == 3 and all(len(one) == 64 for one in found)


def test_a_launcher_may_give_its_own(tmp_path: Path) -> None:
    secret = RankSecret(tmp_path / "run", {SECRET: "of the batch script"})
    secret.offer()
    assert secret.read() == b"of the batch script" and not list(tmp_path.iterdir())
    secret.remove()
