"""A fine-tuned checkpoint on labelled files: transformers' loss, scikit-learn's measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from seqeval.metrics import f1_score

from fedbert_ds.config import ModelSection
from fedbert_ds.data.corpus import Article
from fedbert_ds.data.shards import write_rows
from fedbert_ds.data.tokenizer import train_wordpiece
from fedbert_ds.errors import DataError, ModelError
from fedbert_ds.evaluation.labelled import evaluate_task, is_fine_tuned
from fedbert_ds.model.checkpoint import build_model
from fedbert_ds.tasks.metrics import accuracy, pearson
from fedbert_ds.tasks.registry import TASKS

LABELS = ("O", "B-X", "I-X")
SENTENCE = "the quick brown fox jumps over the lazy dog and runs away from it"
WORDS = SENTENCE.split()
ROWS = {
    "sequence_classification": [
        {"text": " ".join(WORDS[n % 5 : n % 11 + 1]), "text_pair": WORDS[n % 7], "label": n % 3} for n in range(20)
    ],
    "sequence_regression": [{"text": " ".join(WORDS[n % 5 :]), "label": n / 7} for n in range(20)],
    "token_classification": [
        {"tokens": WORDS[: n % 9 + 1], "tags": [(n + k) % 3 for k in range(n % 9 + 1)]} for n in range(20)
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_wordpiece([Article("words", " ".join(WORDS))], 100)


def checkpoint(folder: Path, tokenizer: Any, name: str | None) -> Any:
    task = None if name is None else TASKS[name](LABELS)
    section = ModelSection(hidden_size=16, num_attention_heads=2, max_position_embeddings=32, initializer_range=0.3)
    model = build_model(section, len(tokenizer), tokenizer.pad_token_id, 0, task).eval()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    if name is not None:
        write_rows(folder / "rows.jsonl", ROWS[name])
    return model


@pytest.mark.parametrize("batch_size", [1, 3, 32])
@pytest.mark.parametrize("name", ROWS)
def test_loss_and_measures_are_those_of_transformers_one_by_one(
    tmp_path: Path, tokenizer: Any, name: str, batch_size: int
) -> None:
    model = checkpoint(tmp_path, tokenizer, name)
    result = evaluate_task(tmp_path / "model", [str(tmp_path / "rows.jsonl")], batch_size=batch_size, device="cpu")
    losses, have, told = [], list[float](), list[float]()
    sentences: list[tuple[list[str], list[str]]] = []
    for row in ROWS[name]:
        if name == "token_classification":
            inputs = tokenizer(row["tokens"], is_split_into_words=True, return_tensors="pt")
            words = inputs.word_ids()
            labels = [-100] * len(words)
            for number, tag in enumerate(row["tags"]):
                labels[words.index(number)] = tag
            target = torch.tensor([labels])
        else:
            texts = [row["text"], *([row["text_pair"]] if "text_pair" in row else [])]
            inputs = tokenizer(*texts, return_tensors="pt")
            target = torch.tensor([row["label"]])
        with torch.no_grad():
            out = model(**inputs, labels=target)
        chosen = target != -100
        losses.append(float(out.loss) * int(chosen.sum()))
        have += target[chosen].tolist()
        answers = out.logits[chosen] if name == "token_classification" else out.logits
        told += (answers[:, 0] if name == "sequence_regression" else answers.argmax(-1)).tolist()
        if name == "token_classification":
            sides = target[chosen].tolist(), answers.argmax(-1).tolist()
            sentences.append(tuple([LABELS[number] for number in side] for side in sides))  # type: ignore[arg-type]
    assert result.loss == pytest.approx(sum(losses) / len(have), rel=1e-5)
    assert (result.labels, result.examples) == (len(have), len(ROWS[name]))
    if sentences:
        expected = f1_score([one for one, _ in sentences], [other for _, other in sentences], zero_division=0)
        assert result.measures["f1"] == pytest.approx(expected) and expected > 0
    if name == "sequence_regression":
        assert result.measures["pearson"] == pytest.approx(pearson(np.array(have), np.array(told)), abs=1e-4)
    else:
        assert result.measures["accuracy"] == pytest.approx(accuracy(np.array(have), np.array(told)))


def test_texts_are_cut_to_what_the_model_has_positions_for(tmp_path: Path, tokenizer: Any) -> None:
    checkpoint(tmp_path, tokenizer, "sequence_regression")
    write_rows(tmp_path / "rows.jsonl", [{"text": " ".join(WORDS * 9), "label": 1.0}])
    assert evaluate_task(tmp_path / "model", [str(tmp_path / "rows.jsonl")]).labels == 1
    with pytest.raises(ModelError, match="sequences of 33 tokens do not fit; use at most 32"):
        evaluate_task(tmp_path / "model", [str(tmp_path / "rows.jsonl")], sequence_length=33)


def test_a_checkpoint_says_whether_it_has_a_head_for_labels(tmp_path: Path, tokenizer: Any) -> None:
    checkpoint(tmp_path, tokenizer, None)
    assert not is_fine_tuned(str(tmp_path / "model")) and not is_fine_tuned(str(tmp_path / "nothing"))
    with pytest.raises(ModelError, match="has no head for labels; name a checkpoint that was fine-tuned"):
        evaluate_task(tmp_path / "model", [str(tmp_path / "rows.jsonl")])
    checkpoint(tmp_path, tokenizer, "sequence_regression")
    assert is_fine_tuned(str(tmp_path / "model"))


def test_rows_that_do_not_fit_and_missing_checkpoints_are_one_line(tmp_path: Path, tokenizer: Any) -> None:
    checkpoint(tmp_path, tokenizer, "sequence_classification")
    write_rows(tmp_path / "rows.jsonl", [{"text": "fox", "label": "cat"}])
    with pytest.raises(DataError, match=r"line 1: label 'cat' is none of the task's; use O, B-X, I-X"):
        evaluate_task(tmp_path / "model", [str(tmp_path / "rows.jsonl")])
    with pytest.raises(ModelError, match="cannot be loaded as a fine-tuned checkpoint"):
        evaluate_task(tmp_path / "nothing", [str(tmp_path / "rows.jsonl")])


@pytest.mark.parametrize("device", ["gpu", "cuda:77", "meta"])
def test_a_device_that_cannot_compute_is_one_line(tmp_path: Path, tokenizer: Any, device: str) -> None:
    checkpoint(tmp_path, tokenizer, "sequence_regression")
    write_rows(tmp_path / "rows.jsonl", [{"text": "fox", "label": 1.0}])
    with pytest.raises(ModelError, match=rf"device {device}: cannot be used here \(.+\); try cpu"):
        evaluate_task(tmp_path / "model", [str(tmp_path / "rows.jsonl")], device=device)


def test_examples_without_a_label_to_predict_are_one_line(tmp_path: Path, tokenizer: Any) -> None:
    checkpoint(tmp_path, tokenizer, "sequence_classification")
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(DataError):
        evaluate_task(tmp_path / "model", [str(tmp_path / "rows.jsonl")])
