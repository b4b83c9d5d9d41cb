"""Federated fine-tuning equals centralized fine-tuning: real processes, every task and encoder."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.cluster import CLIENTS, WINDOWS, Centralized, run_file, run_jobs, write_text
from integration.test_equality import MODERN, TOLERANCE, deepspeed_file, gradient_difference
from torch import Tensor

from fedbert_ds.data.shards import write_rows
from fedbert_ds.evaluation.labelled import evaluate_task
from fedbert_ds.model.heads import auto_class
from fedbert_ds.telemetry.evaluations import read_evaluations

pytestmark = pytest.mark.timeout(900)

LABELS = ["O", "B-X", "I-X"]
TASKS: dict[str, dict[str, Any]] = {
    "pairs": {"name": "sequence_classification", "labels": ["no", "perhaps", "yes"]},
    "texts": {"name": "sequence_classification", "labels": ["no", "yes"]},
    "scores": {"name": "sequence_regression"},
    "words": {"name": "token_classification", "labels": LABELS},
}
LAYERS = {"layers": 1}
DIVIDED = 5 * TOLERANCE
"""Of a weight, where the optimizer divides a small gradient by its own size: with `arrival` sums
are of another order in every run."""
ROWS = [
    ("pairs", "bert", 0, "fixed", "embeddings", "adamw"), ("pairs", "electra", 2, "arrival", LAYERS, "lamb"),
    ("pairs", "roberta", 1, "arrival", "embeddings", "muon"), ("texts", "modernbert", 2, "fixed", "embeddings", "sgd"),
    ("texts", "electra", 3, "fixed", "rows", "sgd"), ("texts", "roberta", 0, "arrival", LAYERS, "adamw"),
    ("scores", "bert", 3, "arrival", "rows", "adamw"), ("scores", "modernbert", 1, "fixed", LAYERS, "sgd"),
    ("words", "modernbert", 3, "arrival", "embeddings", "adamw"), ("words", "bert", 2, "arrival", "rows", "muon"),
    ("words", "electra", 1, "fixed", "embeddings", "sgd"), ("words", "roberta", 0, "fixed", "rows", "lamb"),
]  # fmt: skip
"""Task, encoder, ZeRO stage, order, cut, optimizer: each value with several of the others."""


def _name(row: tuple[Any, ...]) -> str:
    return "-".join("layers1" if part == LAYERS else str(part) for part in row)


def _tree(folder: Path, row: tuple[Any, ...], name: str | None = None, **sections: Any) -> dict[str, Any]:
    task, encoder, stage, order, cut, optimizer = row
    tree = run_file(
        folder,
        name or _name(row),
        cut=cut,
        task=TASKS[task],
        window={"order": order},
        body={"deepspeed": str(deepspeed_file(folder, stage))},
        # Plain SGD must move the weights, and squared errors must not run away.
        optimizer={"name": optimizer, "lr": (0.02 if task == "scores" else 0.3) if optimizer == "sgd" else 0.003},
    )
    tree["model"] |= {"architecture": encoder, "initializer_range": 0.1}
    if encoder == "modernbert":
        tree["model"] |= MODERN
    for section, values in sections.items():
        tree[section] = tree[section] | values
    return tree


def write_examples(folder: Path, words: list[str]) -> dict[str, dict[str, str]]:
    """For each task every client's file, in the task's own columns; unequal, some longer than a
    sequence.
    """
    draw = random.Random(11)

    def text(longest: int = 40) -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, longest)))

    def row(task: str) -> dict[str, Any]:
        if task == "pairs":
            return {"text": text(), "text_pair": text(), "label": draw.choice(TASKS[task]["labels"])}
        if task == "texts":
            return {"text": text(), "label": draw.choice(TASKS[task]["labels"])}
        if task == "scores":
            return {"text": text(), "label": draw.uniform(-1, 2)}
        tokens = text(60).split()
        return {"tokens": tokens, "tags": draw.choices(LABELS, k=len(tokens))}

    paths: dict[str, dict[str, str]] = {}
    for task in TASKS:
        paths[task] = {}
        for client, count in CLIENTS.items():
            path = folder / f"{task}-{client}.jsonl"
            write_rows(path, [row(task) for _ in range(6 * count)])
            paths[task][client] = str(path)
    return paths


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, str]]]:
    """All rows, a run in two parts and one in one, with dropout and evaluations."""
    folder = tmp_path_factory.mktemp("fine-tuning")
    text = write_text(folder)
    words = json.loads(Path(text["ada"]).read_text().splitlines()[0])["text"].split()
    data = write_examples(folder, words)
    jobs = [{"config": _tree(folder, row), "resume": False, "data": data[row[0]]} for row in ROWS]
    for name, ends in {"whole": [WINDOWS], "parted": [2, WINDOWS]}.items():
        for number, windows in enumerate(ends):
            run = {"windows": windows, "save_every": 2, "evaluate_every": 2}
            tree = _tree(
                folder, ROWS[0], name, run=run, model={"dropout": 0.2}, data={"client_held_out": 0.2},
                optimizer={"schedule": "constant"},
            )  # fmt: skip
            jobs.append({"config": tree, "resume": number > 0, "data": data["pairs"]})
    run_jobs(folder, jobs)
    return folder, data


def _weights(run: Path) -> dict[str, Tensor]:
    from transformers import AutoConfig

    model = auto_class(AutoConfig.from_pretrained(run / "hf")).from_pretrained(run / "hf")
    return dict(model.state_dict())


def _largest(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    # The true gradient of an attention key's bias is zero.
    names = [name for name in one if not name.endswith("key.bias")]
    return max((one[name] - other[name]).abs().max().item() for name in names)


@pytest.mark.parametrize("row", ROWS, ids=_name)
def test_fine_tuning_equals_centralized_fine_tuning(finished: Any, row: tuple[Any, ...]) -> None:
    folder, data = finished
    training = Centralized(_tree(folder, row), data[row[0]])
    untrained = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
    expected, trained = training.train(), _weights(folder / _name(row))
    assert _largest(trained, expected) <= (TOLERANCE if row[-1] == "sgd" else DIVIDED)
    assert _largest(trained, untrained) > 1e-2
    assert gradient_difference(folder / _name(row), training) <= TOLERANCE


def test_the_rows_hold_every_value_several_times() -> None:
    for place, values in enumerate([TASKS, ("bert", "roberta", "electra", "modernbert"), range(4),
                                    ("fixed", "arrival"), ("embeddings", "rows", LAYERS),
                                    ("sgd", "adamw", "lamb", "muon")]):  # fmt: skip
        for value in values:
            assert sum(row[place] == value for row in ROWS) >= 2, value


def test_a_resumed_run_with_dropout_equals_the_whole_one_to_the_bit(finished: Any) -> None:
    folder, _ = finished
    whole, parted = (_weights(folder / name) for name in ("whole", "parted"))
    assert all(torch.equal(whole[name], parted[name]) for name in whole)
    assert _largest(whole, _weights(folder / _name(ROWS[0]))) > 1e-3, "dropout changes the numbers"


def test_what_clients_measure_is_what_the_merged_model_gives_on_their_text(finished: Any) -> None:
    """The last evaluation, by the split model over the wire, beside transformers on one machine."""
    from fedbert_ds.data.held_out import keep_apart
    from fedbert_ds.tasks.rows import read_rows

    folder, data = finished
    evaluations = read_evaluations(folder / "whole" / "evaluations.jsonl")
    assert [evaluation.window for evaluation in evaluations] == [2, 4, WINDOWS]
    last, total = evaluations[-1], 0
    right = 0.0
    for client, path in data["pairs"].items():
        rows = [row for _, row in read_rows([path])]
        kept = folder / f"kept-{client}.jsonl"
        _, held_out = keep_apart([_Row(row) for row in rows], 0.2)
        write_rows(kept, [one.row for one in held_out])
        result = evaluate_task(folder / "whole" / "hf", [str(kept)], sequence_length=32)
        theirs = last.clients[client]
        assert theirs.masked_tokens == result.examples == len(held_out)
        assert theirs.loss == pytest.approx(result.loss, rel=1e-5)
        assert theirs.measures == pytest.approx(result.measures)
        total, right = total + len(held_out), right + result.measures["accuracy"] * len(held_out)
    assert last.measures["accuracy"] == pytest.approx(right / total)


class _Row:
    def __init__(self, row: Mapping[str, Any]) -> None:
        self.row, self.text = row, ""
