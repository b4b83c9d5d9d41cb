"""GLUE of the compared models: every final model is fine-tuned by `fedbert-ds glue`'s own study."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig

from fedbert_ds.errors import ConfigError
from fedbert_ds.glue.recipe import Recipe, recipe_of
from fedbert_ds.glue.run import DataSource
from fedbert_ds.glue.study import Study, run_study
from fedbert_ds.model.architecture import longest_sequence
from fedbert_ds.tasks.glue_tasks import GLUE, glue_task

LONGEST = 128
"""Tokens of a sequence at most, as in the published recipes."""
QUICK_EXAMPLES = 64

Scores = dict[str, list[float]]
"""By task: a score from -1 or 0 to 1 of each seed, its metrics averaged."""


@dataclass(frozen=True)
class TaskOptions:
    """What a user says of tasks."""

    glue: Path
    """GLUE's original files."""
    tasks: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int | None = None
    learning_rate: float | None = None
    quick: bool = False

    @classmethod
    def of(
        cls,
        glue: Path | None,
        tasks: tuple[str, ...],
        seeds: tuple[int, ...],
        epochs: int | None,
        learning_rate: float | None,
        quick: bool,
    ) -> TaskOptions | None:
        """None without tasks. ConfigError for tasks without files or files without tasks, an
        unknown task and one that is named twice.
        """
        if glue is None and tasks:
            raise ConfigError("--tasks needs --glue DIR, the folder of GLUE's original files; add it")
        if glue is None:
            return None
        if not tasks:
            raise ConfigError("--glue needs --tasks; add --tasks RTE STS-B, say")
        names = tuple(glue_task(name).name for name in tasks)
        for what, given in (("tasks", names), ("glue-seeds", seeds)):
            if len(set(given)) != len(given):
                raise ConfigError(f"--{what} {' '.join(map(str, given))}: name each once")
        return cls(glue, names, seeds, epochs, learning_rate, quick)

    @property
    def source(self) -> DataSource:
        """The examples."""
        few = QUICK_EXAMPLES if self.quick else None
        return DataSource(self.glue, few, few)

    def check(self) -> None:
        """DataError or ConfigError for files that are missing or wrong, and for the recipe."""
        self.recipes(LONGEST)
        for name in self.tasks:
            self.source.read(GLUE[name])

    def recipes(self, longest: int) -> Mapping[str, Recipe]:
        """How each task is fine-tuned, where the model has `longest` positions."""
        return {
            name: recipe_of(
                "standard",
                name,
                epochs=1 if self.quick else self.epochs,
                learning_rate=self.learning_rate,
                length=min(LONGEST, longest),
            )
            for name in self.tasks
        }


def scores(options: TaskOptions, model: str, out: Path, command: str, device: str = "cpu") -> Scores:
    """Fine-tune a checkpoint, with its tokenizer beside it, on every task with every seed.

    Results in the folder `out` are read, not repeated. UserErrors as those of `run_study`.
    """
    longest = longest_sequence(AutoConfig.from_pretrained(model, trust_remote_code=False))
    results = run_study(
        Study(
            model=model,
            out=out,
            recipes=options.recipes(longest),
            seeds=options.seeds,
            source=options.source,
            command=command,
            device=device,
        )
    )
    return {name: [one["score"] for one in results if one["task"] == name] for name in options.tasks}
