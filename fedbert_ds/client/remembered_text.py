"""A client's text between starts: whether a run's cursor still stands in the text that it counted.

A cursor is two integers, made with the text of its day. A note in the client's folder says which
text that was. More text behind the old one leaves the cursor where it is, and joins in the next
epoch. Any other change ends the epoch: the next one begins at the beginning of the new text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fedbert_ds.atomic_write import write_text
from fedbert_ds.data.masking import Batch, SequenceStream
from fedbert_ds.folder_lock import private, private_folder

NOTE = "text.json"


@dataclass(frozen=True)
class Known:
    """A text that a client has trained on."""

    first_epoch: int
    """Cursors of this epoch and later ones, to the next text's first, count its sequences."""
    articles: int
    sequences: int
    tokens: int
    sha256: str
    """Of its tokens."""


Cursor = Mapping[str, int]
"""The `epoch`, `position` and `sequences` of a batch stream."""


@dataclass(frozen=True)
class Continuation:
    """Where training goes on."""

    cursor: Cursor | None
    known: tuple[Known, ...]
    """To be kept: what later cursors count."""
    sentence: str = ""
    """For the owner, if the text has changed."""


def continuation(
    cursor: Cursor | None, known: Sequence[Known], text: Known, beginnings: Collection[str]
) -> Continuation:
    """Where a run's cursor goes on in a text; its `first_epoch` is not looked at.

    `known` are the texts that this client has had in the run, by first epoch, `beginnings` the
    hashes of those that the text begins with.
    """
    if cursor is None:
        return Continuation(None, (replace(text, first_epoch=0),))
    epoch = cursor["epoch"]
    past = tuple(one for one in known if one.first_epoch <= epoch)
    if not past:
        added = text.sequences - cursor["sequences"]
        told = f"{added:,} sequences of text are new, they join in epoch {epoch + 1}" if added > 0 else ""
        return Continuation(cursor, (replace(text, first_epoch=0),), told)
    before = past[-1]
    numbers = f"{before.articles:,} articles before, {text.articles:,} now"
    if before.sha256 in beginnings:
        told = f"the text has grown, {numbers}: what is new joins in epoch {epoch + 1}"
        same = before.tokens == text.tokens
        return Continuation(cursor, (*past[:-1], replace(text, first_epoch=before.first_epoch)), "" if same else told)
    # A window that is planned again begins the same epoch again.
    begun = [one.first_epoch for one in known if one.first_epoch > epoch and one.sha256 == text.sha256]
    first = min(begun, default=epoch + 1)
    return Continuation(
        {"epoch": first, "position": 0, "sequences": text.sequences},
        (*past, replace(text, first_epoch=first)),
        f"another text than before, {numbers}: epoch {first} begins with it",
    )


class RememberedText:
    """A stream of batches that goes on where a run says, in the text as it is now.

    `articles` is their number, `folder` the client's own, `run` the run's id. `tell` hears of a
    text that has changed.
    """

    def __init__(
        self, stream: SequenceStream, articles: int, folder: Path, run: str, tell: Callable[[str], None]
    ) -> None:
        text = stream.text
        self._stream, self._path, self._run, self._tell = stream, folder / NOTE, run, tell
        self._text = Known(0, articles, text.num_sequences, text.num_tokens, text.digest(text.num_tokens))
        self._known = _read(self._path, run)
        # Before the stream to the server is open: of much text it takes a while.
        self._beginnings = {self._text.sha256} | {
            known.sha256
            for known in self._known
            if known.tokens < text.num_tokens and text.digest(known.tokens) == known.sha256
        }
        self._told = ""

    def next_batch(self, window: int, max_tokens: int) -> Batch:
        """See `SequenceStream`."""
        return self._stream.next_batch(window, max_tokens)

    def state_dict(self) -> dict[str, int]:
        """See `SequenceStream`."""
        return self._stream.state_dict()

    def load_state_dict(self, state: Cursor | None) -> None:
        """Go on from a cursor of this run, whichever text it counts; DataError as
        `SequenceStream`.
        """
        found = continuation(state, self._known, self._text, self._beginnings)
        self._stream.load_state_dict(found.cursor)
        if found.known != self._known:
            self._known = found.known
            self._write()
        if found.sentence not in ("", self._told):
            self._told = found.sentence
            self._tell(found.sentence)

    def _write(self) -> None:
        private_folder(self._path.parent)
        with private():
            write_text(self._path, json.dumps({"run": self._run, "texts": [asdict(known) for known in self._known]}))


def _read(path: Path, run: str) -> tuple[Known, ...]:
    """The texts of this run in a note; none if there is no note, or none that can be read."""
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        return tuple(Known(**text) for text in note["texts"]) if note["run"] == run else ()
    except (OSError, ValueError, TypeError, KeyError):
        return ()
