"""An owner's files: read before joining, divided and encoded as the run says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig
from unit.client.one_client import settings_of

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
    with pytest.raises(DataError, match=r"^rows: line 7: label 'maybe' is none of the task's: no, yes$"):
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
