"""One recipe several ways, each scored on the dev set, in one record.

`in one place` is `fedbert-ds glue`, which equals plain transformers code to the bit. The others are
the real launcher with client processes: `split` with one client, the modes with several. A window
holds as many tokens as a batch of the recipe holds on average, so the number of steps is the same
and their batches are not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from fedbert_ds.compare.runs import Job, finished
from fedbert_ds.compare.systems import launched
from fedbert_ds.data.shards import write_rows
from fedbert_ds.data.tokenizer import load_tokenizer
from fedbert_ds.evaluation.labelled import evaluate_task
from fedbert_ds.glue.recipe import Recipe, recipe_of
from fedbert_ds.glue.run import DataSource
from fedbert_ds.glue.study import Study, run_study
from fedbert_ds.run_file import load_config
from fedbert_ds.tasks.glue_data import Examples, TaskData
from fedbert_ds.tasks.glue_tasks import glue_task
from fedbert_ds.tasks.sequence_tasks import encode_texts
from fedbert_ds.tasks.task import Task
from fedbert_ds.telemetry.metrics import read_metrics, summary
from fedbert_ds.telemetry.record import source_commit, write_record
from fedbert_ds.telemetry.tables import markdown

RUN_FILE = Path(__file__).with_name("run.yaml")
IN_ONE_PLACE, SPLIT = "in one place", "split, 1 client"
PERIOD = 20
"""Windows between averages, or of a turn."""
QUICK_EXAMPLES = 64


@dataclass(frozen=True)
class FineTuningOptions:
    """What was typed."""

    model: str
    data: Path
    out: Path
    work: Path
    task: str
    seeds: tuple[int, ...]
    clients: int
    modes: tuple[str, ...]
    command: str
    epochs: int | None = None
    learning_rate: float | None = None
    train_examples: int | None = None
    quick: bool = False


@dataclass(frozen=True)
class Files:
    """Examples as the launcher reads them, and the size of a window."""

    train: Path
    dev: Path
    windows: int
    tokens: int


def bench_fine_tuning(options: FineTuningOptions) -> None:
    """Fine-tune every way that is not there yet, on the CPU; write the record, print the table."""
    glue = glue_task(options.task)
    recipe = recipe_of(
        "run_glue",
        glue.name,
        epochs=1 if options.quick else options.epochs,
        learning_rate=options.learning_rate,
    )
    limit = QUICK_EXAMPLES if options.quick else options.train_examples
    source = DataSource(options.data, limit, QUICK_EXAMPLES if options.quick else None)
    data, task = source.read(glue), glue.task
    files = write_files(options, task, data, recipe)
    rows = _in_one_place(options, task, recipe, source, files)
    for seed in options.seeds:
        rows += [_federated(options, task, recipe, files, way, seed) for way in (SPLIT, *options.modes)]
    write_record(
        options.out,
        command=options.command,
        commit=source_commit(),
        rows=rows,
        recipe=asdict(recipe),
        train_examples=len(data.train),
    )
    print(table(rows))


def write_files(options: FineTuningOptions, task: Task, data: TaskData, recipe: Recipe) -> Files:
    """Write the examples that are used, in the task's own columns."""
    train, dev = options.work / "train.jsonl", options.work / "dev.jsonl"
    options.work.mkdir(parents=True, exist_ok=True)
    write_rows(train, map(task.row, data.train))
    write_rows(dev, map(task.row, next(iter(data.dev.values()))))
    tokens = tokens_of(data.train, options.model, recipe)
    return Files(train, dev, recipe.steps(len(data.train)), round(recipe.batch_size * tokens))


def tokens_of(examples: Examples, model: str, recipe: Recipe) -> float:
    """Tokens of an example, in the mean."""
    rows = encode_texts([one.texts for one in examples], load_tokenizer(model), recipe.length)
    return mean(len(ids) for ids in rows["input_ids"])


def overrides_of(
    options: FineTuningOptions, task: Task, recipe: Recipe, files: Files, way: str, seed: int
) -> list[str]:
    """What a run changes in the run file."""
    clients = 1 if way == SPLIT else options.clients
    labels = {"labels": list(task.labels)} if task.labels else {}
    mode = {"mode": "synchronous" if way == SPLIT else way}
    if mode["mode"] != "synchronous":
        mode |= {"average_every": PERIOD}  # type: ignore[dict-item]
    # A turn must end within the run.
    windows = max(PERIOD, files.windows // PERIOD * PERIOD) if mode["mode"] == "sequential" else files.windows
    values: dict[str, Any] = {
        "run.directory": str(options.work / f"{way.replace(', ', '-').replace(' ', '-')}-seed-{seed}"),
        "run.seed": seed,
        "run.windows": windows,
        "model.checkpoint": options.model,
        "task": {"name": task.name, **labels},
        "data.source": [str(files.train)],
        "data.sequence_length": recipe.length,
        "window.tokens": files.tokens,
        "window.tokens_per_micro_batch": max(files.tokens, recipe.length),
        "optimizer.lr": recipe.learning_rate,
        "federation": mode,
        "clients.expected": clients,
        "clients.local": clients,
    }
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def _in_one_place(
    options: FineTuningOptions, task: Task, recipe: Recipe, source: DataSource, files: Files
) -> list[dict[str, Any]]:
    results = run_study(
        Study(
            model=options.model,
            out=options.work / "in-one-place",
            recipes={glue_task(options.task).name: recipe},
            seeds=options.seeds,
            source=source,
            command=options.command,
            device="cpu",
        )
    )
    return [
        {
            "way": IN_ONE_PLACE,
            "seed": result["seed"],
            "measures": next(iter(result["dev"].values())),
            "windows": files.windows,
            "seconds": result["seconds"],
        }
        for result in results
    ]


def _federated(
    options: FineTuningOptions, task: Task, recipe: Recipe, files: Files, way: str, seed: int
) -> dict[str, Any]:
    overrides = overrides_of(options, task, recipe, files, way, seed)
    config = load_config(RUN_FILE, overrides)
    label = f"{way}, seed {seed}"
    command, train = launched(RUN_FILE, overrides, 1), files.train.read_text("utf-8")
    job = Job(label, config, command, [train], resumes=True)

    def measure() -> Mapping[str, Any]:
        whole = summary(read_metrics(job.folder.metrics))
        found = evaluate_task(job.folder.model, [str(files.dev)], sequence_length=recipe.length, device="cpu")
        return {
            "measures": found.measures,
            "held_out_loss": found.loss,
            "windows": whole.windows,
            "tokens": whole.tokens,
            "bytes_per_token": whole.bytes_per_token,
            "update_bytes_per_token": whole.update_bytes_per_token,
        }

    result = finished(job, source_commit(), measure)
    clients = config.clients.expected
    name = way if way == SPLIT else f"{way}, {clients} clients"
    return {"way": name, "seed": seed, **{key: value for key, value in result.items() if key != "settings"}}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: measures on the dev set in points of 100, a line for each way and seed."""
    measures = [name for name in rows[0]["measures"] if all(name in row["measures"] for row in rows)]
    heads = ["fine-tuned", "seed", *measures, "steps", "bytes per token", "of these client updates"]

    def cells(row: Mapping[str, Any]) -> list[str]:
        crossed = [f"{row[key]:,.0f}" if key in row else "" for key in ("bytes_per_token", "update_bytes_per_token")]
        points = [f"{100 * row['measures'][name]:.1f}" for name in measures]
        return [row["way"], str(row["seed"]), *points, f"{row['windows']:,}", *crossed]

    return markdown(heads, map(cells, rows))
