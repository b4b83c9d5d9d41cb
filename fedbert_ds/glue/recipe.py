"""How a task is fine-tuned: published recipes, and what each changes for small tasks."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from fedbert_ds.errors import ConfigError

SMALL_TASKS = ("MRPC", "RTE")
"""They get 5 epochs where others get 3."""


@dataclass(frozen=True)
class Recipe:
    """AdamW with a linear decay to 0, on sequences cut to `length` tokens."""

    epochs: int = 3
    learning_rate: float = 2e-5
    """At the end of the warm-up."""
    batch_size: int = 32
    length: int = 128
    """Tokens of a sequence at most, special ones counted."""
    warm_up: float = 0.06
    """Share of all steps."""
    clip_norm: float = 1.0
    best_epoch: bool = True
    """Keep the epoch with the best dev score; False keeps the last."""
    precision: str = "fp32"
    """Of the computation: fp32, or bf16 under autocast."""

    def steps(self, num_examples: int) -> int:
        """All optimizer steps on so many examples; an epoch's last batch may be smaller."""
        return self.epochs * math.ceil(num_examples / self.batch_size)

    def warm_up_steps(self, num_examples: int) -> int:
        """Steps with a rising learning rate, rounded up as transformers' Trainer does."""
        return math.ceil(self.steps(num_examples) * self.warm_up)


RECIPES: dict[str, Recipe] = {
    "standard": Recipe(),
    "run_glue": Recipe(warm_up=0.0, best_epoch=False),
}
"""`run_glue` is that of transformers' examples/pytorch/text-classification/README.md. `standard` is
the same with the warm-up and the best epoch of RoBERTa's (Liu et al., 2019, Table 10)."""


def recipe_of(
    name: str,
    task_name: str,
    *,
    epochs: int | None = None,
    learning_rate: float | None = None,
    batch_size: int | None = None,
    length: int | None = None,
    precision: str | None = None,
) -> Recipe:
    """The recipe of this name for a task, with the given values in place of its own.

    ConfigError for an unknown name or a value that cannot be.
    """
    if name not in RECIPES:
        raise ConfigError(f"--recipe {name}: choose {', '.join(RECIPES)}")
    for option, value in (("epochs", epochs), ("learning-rate", learning_rate), ("batch-size", batch_size)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ConfigError(f"--{option} {value:g}: must be above 0")
    if length is not None and length < 8:
        raise ConfigError(f"--length {length}: must be 8 or more, so that two texts fit")
    recipe = replace(RECIPES[name], epochs=5) if task_name in SMALL_TASKS else RECIPES[name]
    given = {
        "epochs": epochs, "learning_rate": learning_rate, "batch_size": batch_size, "length": length,
        "precision": precision,
    }  # fmt: skip
    return replace(recipe, **{key: value for key, value in given.items() if value is not None})  # type: ignore[arg-type]
