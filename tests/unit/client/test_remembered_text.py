"""Text that changes between starts: a cursor never counts other sequences than it was made with."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from fedbert_ds.client.remembered_text import NOTE, Known, RememberedText, continuation
from fedbert_ds.data.corpus import Article
from fedbert_ds.data.masking import BatchStream, encode
from fedbert_ds.data.tokenizer import train_wordpiece
from fedbert_ds.errors import DataError

ARTICLES = [Article(f"{n}", f"the quick brown fox jumps over {'lazy dogs ' * (n + 1)}") for n in range(8)]
OTHER = [Article("other", "lazy dogs jump over the fox"), *ARTICLES[1:]]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_wordpiece(ARTICLES, 120)


class Client:
    """One client's folder, started again and again."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        self.folder, self.tokenizer = folder, tokenizer
        self.told: list[str] = []

    def start(self, articles: list[Article], run: str = "a run") -> RememberedText:
        self.told.clear()
        return RememberedText(self.stream(articles), len(articles), self.folder, run, self.told.append)

    def stream(self, articles: list[Article]) -> BatchStream:
        text = encode(articles, self.tokenizer, 16)
        return BatchStream(text, self.tokenizer, mask_probability=0.3, whole_word=False, seed=1, client="ada")


@pytest.fixture
def client(tmp_path: Path, tokenizer: Any) -> Client:
    return Client(tmp_path / "state", tokenizer)


def trained(text: RememberedText, cursor: dict[str, int] | None, windows: int = 3) -> dict[str, int]:
    """The cursor after some windows from another one."""
    text.load_state_dict(cursor)
    for window in range(windows):
        text.next_batch(window, 20)
    return text.state_dict()


def test_the_same_text_goes_on_where_it_was(client: Client) -> None:
    cursor = trained(client.start(ARTICLES), None)
    again, plain = client.start(ARTICLES), client.stream(ARTICLES)
    again.load_state_dict(cursor)
    plain.load_state_dict(cursor)
    assert again.state_dict() == cursor
    assert again.next_batch(3, 40).input_ids.equal(plain.next_batch(3, 40).input_ids)
    assert client.told == []


def test_text_behind_the_old_one_leaves_the_cursor_and_joins_in_the_next_epoch(client: Client) -> None:
    cursor = trained(client.start(ARTICLES[:5]), None)
    grown = client.start(ARTICLES)
    grown.load_state_dict(cursor)
    assert grown.state_dict() == cursor
    assert client.told == ["the text has grown, 5 articles before, 8 now: what is new joins in epoch 1"]
    # And once more, with a cursor that counts the first text.
    again = client.start(ARTICLES)
    again.load_state_dict(cursor)
    assert again.state_dict() == cursor and client.told == []


@pytest.mark.parametrize("now", [OTHER, ARTICLES[1:], ARTICLES[:3], [*ARTICLES[:4], OTHER[0], *ARTICLES[4:]]])
def test_any_other_text_begins_the_next_epoch(client: Client, now: list[Article]) -> None:
    """A file in front of others, an edited or a missing one: the places of the cursor are of other
    sequences now, some of which would be trained twice and others not at all.
    """
    cursor = trained(client.start(ARTICLES), None)
    assert cursor["epoch"] == 0
    other = client.start(now)
    other.load_state_dict(cursor)
    fresh = client.stream(now)
    assert other.state_dict() == {"epoch": 1, "position": 0, "sequences": fresh.text.num_sequences}
    assert client.told == [
        f"another text than before, 8 articles before, {len(now)} now: epoch 1 begins with it"
    ]  # fmt: skip


def test_a_client_killed_before_its_window_counted_begins_the_same_epoch_again(client: Client) -> None:
    """The server's cursor is still the old text's; the note is the new one's already."""
    cursor = trained(client.start(ARTICLES), None)
    first = trained(client.start(OTHER), cursor)
    assert trained(client.start(OTHER), cursor) == first
    # A roll-back in the same process, too, told once.
    text = client.start(OTHER)
    assert trained(text, cursor) == trained(text, cursor) == first
    assert len(client.told) == 1
    # Later cursors are the new text's.
    text.load_state_dict(first)
    assert text.state_dict() == first


def test_the_old_text_that_comes_back_goes_on_with_its_own_cursor(client: Client) -> None:
    cursor = trained(client.start(ARTICLES), None)
    trained(client.start(OTHER), cursor)
    back = client.start(ARTICLES)
    back.load_state_dict(cursor)
    assert back.state_dict() == cursor and client.told == []


def test_equal_numbers_of_sequences_do_not_hide_a_change(client: Client) -> None:
    swapped = [ARTICLES[1], ARTICLES[0], *ARTICLES[2:]]
    cursor = trained(client.start(ARTICLES), None)
    text = client.start(swapped)
    text.load_state_dict(cursor)
    assert text.state_dict() == {"epoch": 1, "position": 0, "sequences": cursor["sequences"]}


def test_without_a_note_a_cursor_is_taken_at_its_word(client: Client) -> None:
    """As on another machine, without the folder."""
    cursor = trained(client.start(ARTICLES[:5]), None)
    (client.folder / NOTE).unlink()
    text = client.start(ARTICLES)
    text.load_state_dict(cursor)
    assert text.state_dict() == cursor
    assert len(client.told) == 1 and "sequences of text are new, they join in epoch 1" in client.told[0]
    (client.folder / NOTE).unlink()
    with pytest.raises(DataError, match="before in this run"):
        client.start(ARTICLES[:4]).load_state_dict(cursor)


@pytest.mark.parametrize("note", ["{", "[]", '{"run": "a run", "texts": [{"epoch": 3}]}', '{"run": "a run"}'])
def test_a_note_that_cannot_be_read_is_none(client: Client, note: str) -> None:
    cursor = trained(client.start(ARTICLES), None)
    (client.folder / NOTE).write_text(note)
    text = client.start(ARTICLES)
    text.load_state_dict(cursor)
    assert text.state_dict() == cursor
    assert json.loads((client.folder / NOTE).read_text())["run"] == "a run"


def test_a_note_is_of_one_run_and_private(client: Client) -> None:
    cursor = trained(client.start(ARTICLES), None)
    assert stat.S_IMODE((client.folder / NOTE).stat().st_mode) == 0o600
    text = client.start(OTHER, "another run")
    text.load_state_dict({**cursor, "sequences": 1})
    assert client.told and "another text" not in client.told[0]


def test_the_beginning_of_a_run_forgets_texts() -> None:
    known = (Known(0, 1, 10, 100, "a"), Known(4, 2, 20, 200, "b"))
    text = Known(0, 3, 30, 300, "c")
    assert continuation(None, known, text, {"c"}).known == (text,)
    found = continuation({"epoch": 5, "position": 1, "sequences": 20}, known, text, {"c", "b"})
    assert found.known == (known[0], Known(4, 3, 30, 300, "c")) and found.cursor == {
        "epoch": 5,
        "position": 1,
        "sequences": 20,
    }
