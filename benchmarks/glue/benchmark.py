"""Each task and seed twice, by `fedbert-ds glue` and by plain transformers code, in one record."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.glue.plain import plain_run
from fedbert_ds.atomic_write import write_text
from fedbert_ds.glue.recipe import recipe_of
from fedbert_ds.glue.run import DataSource
from fedbert_ds.glue.study import Study, run_study
from fedbert_ds.tasks.glue_tasks import glue_task
from fedbert_ds.telemetry.record import source_commit, write_record
from fedbert_ds.telemetry.tables import markdown

QUICK_EXAMPLES = 64


@dataclass(frozen=True)
class GlueOptions:
    """What was typed."""

    model: str
    data: Path
    out: Path
    work: Path
    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    command: str
    epochs: int | None = None
    learning_rate: float | None = None
    train_examples: int | None = None
    quick: bool = False


def bench_glue(options: GlueOptions) -> None:
    """Fine-tune both ways with the recipe run_glue, on the CPU; write the record, print it."""
    names = [glue_task(name).name for name in options.tasks]
    epochs = 1 if options.quick else options.epochs
    recipes = {name: recipe_of("run_glue", name, epochs=epochs, learning_rate=options.learning_rate) for name in names}
    limit = QUICK_EXAMPLES if options.quick else options.train_examples
    source = DataSource(options.data, limit, QUICK_EXAMPLES if options.quick else None)
    plain: dict[tuple[str, int], dict[str, Any]] = {}
    for name in names:
        task = glue_task(name)
        data = source.read(task)
        for seed in options.seeds:
            path = options.work / "plain" / name / f"seed-{seed}.json"
            settings = {"model": options.model, "data": data.digest, **asdict(recipes[name])}
            known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            if known.get("settings") != settings:
                began = time.monotonic()
                dev, losses = plain_run(options.model, task, data, recipes[name], seed, options.work / "trainer")
                known = {"settings": settings, "dev": dev, "losses": losses, "seconds": time.monotonic() - began}
                write_text(path, json.dumps(known))
            plain[name, seed] = known
    ours = run_study(
        Study(
            model=options.model,
            out=options.work / "ours",
            recipes=recipes,
            seeds=options.seeds,
            source=source,
            command=options.command,
            device="cpu",
        )
    )
    rows = [_row(result, plain[result["task"], result["seed"]]) for result in ours]
    write_record(
        options.out,
        command=options.command,
        commit=source_commit(),
        rows=rows,
        recipes={name: asdict(recipe) for name, recipe in recipes.items()},
    )
    print(table(rows))


def _row(ours: Mapping[str, Any], plain: Mapping[str, Any]) -> dict[str, Any]:
    losses = plain["losses"]
    steps = len(losses) // len(ours["epochs"])
    # In fp32, as ours: another precision would round the mean otherwise.
    epoch_losses = [float(torch.tensor(losses[start : start + steps]).mean()) for start in range(0, len(losses), steps)]
    return {
        "task": ours["task"],
        "seed": ours["seed"],
        "train_examples": ours["train_examples"],
        "ours": ours["dev"],
        "plain": plain["dev"],
        "largest_difference": max(
            abs(value - plain["dev"][split][metric])
            for split, one in ours["dev"].items()
            for metric, value in one.items()
        ),
        "train_loss": [epoch["train_loss"] for epoch in ours["epochs"]],
        "plain_train_loss": epoch_losses,
        "seconds": ours["seconds"],
        "plain_seconds": round(plain["seconds"], 1),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: both ways' dev metrics in points of 100, and by how much their losses differ."""
    lines = []
    for row in rows:
        loss = max(abs(one - other) for one, other in zip(row["train_loss"], row["plain_train_loss"], strict=True))
        for split, metrics in row["ours"].items():
            for metric, value in metrics.items():
                lines.append(
                    (
                        f"{row['task']}{split.removeprefix('dev').replace('_', ' ')}",
                        metric,
                        str(row["seed"]),
                        f"{row['train_examples']:,}",
                        f"{100 * value:.2f}",
                        f"{100 * row['plain'][split][metric]:.2f}",
                        f"{loss:.0e}" if loss else "0",
                    )
                )
    heads = ("task", "metric", "seed", "examples", "fedbert-ds glue", "plain transformers", "train loss differs by")
    return markdown(heads, lines, words=2)
