"""An owner's files: read before joining, divided and encoded as the run says."""

from __future__ import annotations

import json
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig
from unit.client.one_client import settings_of

from fedbert_ds.client import own_data
from fedbert_ds.client.own_data import OwnExamples, Share, read_own_data
from fedbert_ds.config import SequenceSection
from fedbert_ds.data.corpus import Article, read_articles
from fedbert_ds.data.held_out import evaluation_batch, keep_apart
from fedbert_ds.data.masking import BatchStream, encode
from fedbert_ds.data.shards import write_rows, write_shard
from fedbert_ds.data.tokenizer import train_wordpiece
from fedbert_ds.errors import DataError, WireError
from fedbert_ds.tasks.registry import TASKS

ARTICLES = [Article(f"{n}", "the quick brown fox jumps over the lazy dog " * (n + 1)) for n in range(6)]
TASK = TASKS["sequence_classification"](("no", "yes"))
SETTINGS = settings_of(sequences=SequenceSection(sequence_length=16, mask_probability=0.3))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_wordpiece(ARTICLES, 120)


def config(task: Any = TASK) -> BertConfig:
    return BertConfig(architectures=[f"Bert{task.head}"], **task.config_fields)


def text_of(number: int) -> str:
    """Another text for each number, of as many characters."""
    return " ".join(["jumps", "quick"][number >> bit & 1] for bit in range(4))


def rows_of(folder: Path, count: int = 10) -> str:
    path = folder / "rows.jsonl"
    write_rows(path, [{"text": text_of(n), "label": ("no", "yes")[n % 2], "by": [["ann"], 3]} for n in range(count)])
    return str(path)


@pytest.mark.parametrize("held_out", [0.0, 0.3])
def test_text_is_masked_as_the_run_says(tmp_path: Path, tokenizer: Any, held_out: float) -> None:
    write_shard(tmp_path / "text.jsonl", ARTICLES)
    own = read_own_data([str(tmp_path / "text.jsonl")], "masked_lm")
    assert own.num_characters == sum(len(article.text) for article in ARTICLES)
    stream, kept = own.encoded(tokenizer, BertConfig(), SETTINGS, Share("ada", held_out, 40))
    trained_on, apart = keep_apart(list(read_articles([str(tmp_path / "text.jsonl")])), held_out)
    masking: dict[str, Any] = {"mask_probability": 0.3, "whole_word": False, "seed": 1, "client": "ada"}
    expected = BatchStream(encode(trained_on, tokenizer, 16), tokenizer, **masking)
    for window in range(3):
        mine, theirs = stream.next_batch(window, 40), expected.next_batch(window, 40)
        assert torch.equal(mine.input_ids, theirs.input_ids) and torch.equal(mine.labels, theirs.labels)
    assert (kept is None) == (held_out == 0.0)
    if kept is not None:
        batch = evaluation_batch(encode(apart, tokenizer, 16), tokenizer, max_tokens=40, **masking)
        assert torch.equal(kept.input_ids, batch.input_ids)


def test_examples_are_divided_and_none_is_in_both_parts(tmp_path: Path, tokenizer: Any) -> None:
    own = read_own_data([rows_of(tmp_path)], "sequence_classification")
    texts = sum(len(text_of(n)) for n in range(10))
    assert own.num_characters == texts + 10 * 3 + 5 * (2 + 3), "all text of a row: columns are not known yet"
    stream, kept = own.encoded(tokenizer, config(), SETTINGS, Share("ada", 0.3, 10_000))
    assert kept is not None
    batch = stream.next_batch(0, 100)
    told = {tuple(ids.tolist()) for one in (batch, kept) for ids in one.input_ids.split(one.lengths)}
    assert told == {tuple(tokenizer(text_of(n))["input_ids"]) for n in range(10)}
    trained = {tuple(ids.tolist()) for ids in batch.input_ids.split(batch.lengths)}
    assert not trained & {tuple(ids.tolist()) for ids in kept.input_ids.split(kept.lengths)}


def test_without_evaluations_nothing_held_out_is_encoded(tmp_path: Path, tokenizer: Any) -> None:
    own = read_own_data([rows_of(tmp_path)], "sequence_classification")
    _, kept = own.encoded(tokenizer, config(), SETTINGS, Share("ada", 0.3, 0))
    assert kept is None


def test_an_owners_own_columns_are_read(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("note,grade\nfox,yes\ndog,no\n")
    own = read_own_data([str(path)], "sequence_classification", ["note"], "grade")
    stream, _ = own.encoded(tokenizer, config(), SETTINGS, Share("ada", 0.0, 0))
    assert sorted(stream.next_batch(0, 8).labels.tolist()) == [0, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"note": "fox", "label": "no"}\n', "line 1: no column 'text'"),
        ('{"text": "fox", "label": "no"}\n{"text": "dog"}\n', "line 2: no column 'label'"),
        ('{"text": "", "label": 1}\n', "no text; name files with text in --data"),
    ],
)
def test_files_without_what_the_task_needs_are_told_before_joining(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_own_data([str(path)], "sequence_classification")


def test_a_label_outside_the_runs_set_is_one_line(tokenizer: Any) -> None:
    own = OwnExamples([("rows: line 7", {"text": "fox", "label": "maybe"})])
    with pytest.raises(DataError, match=r"^rows: line 7: label 'maybe' is none of the task's; use no, yes$"):
        own.encoded(tokenizer, config(), SETTINGS, Share("ada", 0.0, 0))
    with pytest.raises(WireError, match="no head for labels"):
        own.encoded(tokenizer, BertConfig(), SETTINGS, Share("ada", 0.0, 0))


def test_words_with_labels(tmp_path: Path, tokenizer: Any) -> None:
    task = TASKS["token_classification"](("O", "B-X"))
    path = tmp_path / "notes.jsonl"
    path.write_text(json.dumps({"tokens": ["fox", "jumps"], "tags": ["B-X", "O"]}))
    own = read_own_data([str(path)], task.name)
    assert own.num_characters == 3 + 5 + 3 + 1
    batch = own.encoded(tokenizer, config(task), SETTINGS, Share("ada", 0.0, 0))[0].next_batch(0, 4)
    assert batch.labels[:2].tolist() == [1, 0]


# -- tokens that are kept --------------------------------------------------------------------------


class Owner:
    """Starts with a cache, as `fedbert-ds client` does, and counts how often text is read."""

    def __init__(self, folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self.cache, self.tokenizer = folder / "text.jsonl", folder / "tokens", tokenizer
        self.readings = 0

        def counted(*arguments: Any, **named: Any) -> Any:
            self.readings += 1
            return read_articles(*arguments, **named)

        monkeypatch.setattr(own_data, "read_articles", counted)

    def start(self, held_out: float = 0.3, length: int = 16, encoding: str | None = None) -> tuple[Any, Any, list[str]]:
        self.readings = 0
        own = read_own_data([str(self.path)], "masked_lm", encoding=encoding, cache=self.cache)
        settings = settings_of(sequences=SequenceSection(sequence_length=length, mask_probability=0.3))
        stream, kept = own.encoded(self.tokenizer, BertConfig(), settings, Share("ada", held_out, 40))
        return stream, kept, [*own.summary, *own.tokens_told]


@pytest.fixture
def owner(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Owner:
    made = Owner(tmp_path, tokenizer, monkeypatch)
    write_shard(made.path, ARTICLES)
    return made


def test_a_second_start_reads_no_text_and_trains_on_the_same(owner: Owner) -> None:
    stream, kept, told = owner.start()
    assert owner.readings == 2, "to count it before joining, and to tokenize it"
    in_memory, apart = read_own_data([str(owner.path)], "masked_lm").encoded(
        owner.tokenizer, BertConfig(), SETTINGS, Share("ada", 0.3, 40)
    )
    again, kept_again, told_again = owner.start()
    assert owner.readings == 0 and told_again == told
    assert told[0] == "1 file, 6 articles, 924 characters, longest word 5"
    assert told[1].endswith("sequences to train on, 0.00 % [UNK]")
    for window in range(3):
        batches = [one.next_batch(window, 40) for one in (stream, again, in_memory)]
        assert all(batch.input_ids.equal(batches[0].input_ids) for batch in batches)
    for batch in (kept, kept_again):
        assert batch.input_ids.equal(apart.input_ids) and batch.labels.equal(apart.labels)


@pytest.mark.parametrize(
    ("change", "start"),
    [
        (lambda owner: write_shard(owner.path, [*ARTICLES, ARTICLES[0]]), {}),
        (lambda owner: os.utime(owner.path, ns=(1, 1)), {}),
        (lambda owner: None, {"held_out": 0.0}),
        (lambda owner: None, {"length": 12}),
        (lambda owner: None, {"encoding": "latin-1"}),
        (lambda owner: setattr(owner, "tokenizer", train_wordpiece(ARTICLES, 90)), {}),
        (lambda owner: [path.unlink() for path in owner.cache.rglob("*.tokens")], {}),
    ],
    ids=["more text", "written again", "another share", "another length", "another encoding", "another tokenizer",
         "damage"],
)  # fmt: skip
def test_whatever_could_change_a_token_makes_them_anew(owner: Owner, change: Any, start: dict[str, Any]) -> None:
    owner.start()
    change(owner)
    owner.start(**start)
    assert owner.readings >= 1
    owner.start(**start)
    assert owner.readings == 0 and len(list(owner.cache.iterdir())) == 1


def test_a_text_that_changes_while_it_is_read_is_one_line(owner: Owner) -> None:
    own = read_own_data([str(owner.path)], "masked_lm", cache=owner.cache)
    write_shard(owner.path, ARTICLES[:-1])
    with pytest.raises(DataError, match="the text changed while it was read; start this client again when"):
        own.encoded(owner.tokenizer, BertConfig(), SETTINGS, Share("ada", 0.0, 0))
    assert not list(owner.cache.iterdir())
    own = read_own_data([str(owner.path)], "masked_lm")
    write_shard(owner.path, ARTICLES)
    with pytest.raises(DataError, match="the text changed"):
        own.encoded(owner.tokenizer, BertConfig(), SETTINGS, Share("ada", 0.0, 0))
    own = read_own_data([str(owner.path)], "masked_lm", cache=owner.cache)
    write_shard(owner.path, [*ARTICLES[1:-1], ARTICLES[0]])  # as many characters
    with pytest.raises(DataError, match="the text changed"):
        own.encoded(owner.tokenizer, BertConfig(), SETTINGS, Share("ada", 0.0, 0))


def test_a_text_that_nothing_identifies_is_read_every_time(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_data, "identity_of", lambda sources: None)
    first = owner.start()[0].next_batch(0, 40)
    assert owner.start()[0].next_batch(0, 40).input_ids.equal(first.input_ids)
    assert owner.readings == 2 and len(list(owner.cache.iterdir())) == 1


def test_articles_are_never_in_memory_together(owner: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither when they are counted nor when they are tokenized."""
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0

    class Watched(str):
        __slots__ = ("__weakref__",)

    def articles(*_: Any, reading: Any, **__: Any) -> Any:
        nonlocal most
        for number in range(300):
            text = Watched(f"{number} " + "the quick brown fox " * 400)  # a set has equal ones once
            alive.add(text)
            most = max(most, len(alive))
            reading.articles += 1
            reading.characters += len(text)
            yield Article(str(number), text)
            del text

    monkeypatch.setattr(own_data, "read_articles", articles)
    owner.start()
    assert 0 < most < 100, "of 300"
