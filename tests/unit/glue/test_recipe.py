"""The published recipes' numbers, their steps, and values that cannot be."""

from __future__ import annotations

import pytest
from transformers import TrainingArguments

from fedbert_ds.errors import ConfigError
from fedbert_ds.glue.recipe import Recipe, recipe_of


@pytest.mark.parametrize("task, epochs", [("MRPC", 5), ("RTE", 5), ("SST-2", 3), ("MNLI", 3), ("STS-B", 3)])
def test_run_glue_is_the_published_recipe(task: str, epochs: int) -> None:
    recipe = recipe_of("run_glue", task)
    assert (recipe.epochs, recipe.learning_rate, recipe.batch_size, recipe.length) == (epochs, 2e-5, 32, 128)
    assert (recipe.warm_up, recipe.best_epoch, recipe.clip_norm) == (0.0, False, 1.0)


def test_the_standard_one_warms_up_and_keeps_the_best_epoch() -> None:
    recipe = recipe_of("standard", "RTE")
    assert (recipe.epochs, recipe.warm_up, recipe.best_epoch) == (5, 0.06, True)


@pytest.mark.parametrize("num_examples", [1, 31, 32, 33, 2490, 67349])
def test_steps_and_warm_up_as_the_trainer_counts_them(num_examples: int) -> None:
    recipe = Recipe(epochs=3)
    steps = 3 * -(-num_examples // 32)
    assert recipe.steps(num_examples) == steps
    arguments = TrainingArguments(output_dir="unused", warmup_steps=recipe.warm_up, report_to=[])
    assert recipe.warm_up_steps(num_examples) == arguments.get_warmup_steps(steps)


def test_what_is_given_wins() -> None:
    recipe = recipe_of("run_glue", "RTE", epochs=2, learning_rate=1e-4, batch_size=8, length=64, precision="bf16")
    assert recipe == Recipe(2, 1e-4, 8, 64, 0.0, 1.0, False, "bf16")


@pytest.mark.parametrize(
    "name, values, says",
    [
        ("best", {}, "--recipe best: choose standard, run_glue"),
        ("standard", {"epochs": 0}, "--epochs 0: must be above 0"),
        ("standard", {"learning_rate": float("nan")}, "--learning-rate nan"),
        ("standard", {"batch_size": -1}, "--batch-size -1"),
        ("standard", {"length": 4}, "--length 4"),
    ],
)
def test_what_cannot_be_is_one_line(name: str, values: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        recipe_of(name, "RTE", **values)
