"""Every way gets the recipe's steps and rate on the same examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fine_tuning import benchmark
from benchmarks.fine_tuning.__main__ import PROGRAM, build_parser
from benchmarks.fine_tuning.benchmark import SPLIT, FineTuningOptions, overrides_of, table, write_files
from fedbert_ds.bench.commands import typed
from fedbert_ds.config import ModelSection
from fedbert_ds.data.corpus import Article
from fedbert_ds.data.tokenizer import train_wordpiece
from fedbert_ds.glue.recipe import recipe_of
from fedbert_ds.glue.run import DataSource
from fedbert_ds.model.checkpoint import build_model
from fedbert_ds.run_file import load_config
from fedbert_ds.tasks.glue_tasks import GLUE
from fedbert_ds.tasks.rows import read_rows

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"]


@pytest.fixture
def options(tmp_path: Path) -> FineTuningOptions:
    tokenizer = train_wordpiece([Article("one", " ".join(WORDS * 9))], 100)
    section = ModelSection(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, max_position_embeddings=128)
    build_model(section, len(tokenizer), tokenizer.pad_token_id, 0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data" / "SST-2").mkdir(parents=True)
    lines = [f"{' '.join(WORDS[: 1 + number % 7])}\t{number % 2}" for number in range(70)]
    for name in ("train", "dev"):
        (tmp_path / "data" / "SST-2" / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *lines, ""]))
    given = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data"), "--work", str(tmp_path / "work")]
    given += ["--out", str(tmp_path / "record.json"), "--modes", "synchronous", "sequential"]
    return typed(FineTuningOptions, build_parser().parse_args(given), PROGRAM)


def test_a_window_is_a_batch_of_the_recipe_in_the_mean(options: FineTuningOptions) -> None:
    task, recipe = GLUE["SST-2"].task, recipe_of("run_glue", "SST-2")
    data = DataSource(options.data).read(GLUE["SST-2"])
    files = write_files(options, task, data, recipe)
    assert files.windows == recipe.steps(70) == 3 * 3
    # 70 texts of 1 to 7 words, each once a token, with both ends.
    assert files.tokens == 32 * (4 + 2)
    rows = [row for _, row in read_rows([str(files.train)])]
    assert [(row["text"], row["label"]) for row in rows] == [(one.texts[0], one.label) for one in data.train]


@pytest.mark.parametrize(("way", "clients", "windows"), [(SPLIT, 1, 9), ("synchronous", 4, 9), ("parallel", 4, 9)])
def test_the_run_file_has_the_recipe(options: FineTuningOptions, way: str, clients: int, windows: int) -> None:
    task, recipe = GLUE["SST-2"].task, recipe_of("run_glue", "SST-2")
    files = write_files(options, task, DataSource(options.data).read(GLUE["SST-2"]), recipe)
    config = load_config(benchmark.RUN_FILE, overrides_of(options, task, recipe, files, way, 7))
    assert (config.run.windows, config.run.seed, config.clients.local) == (windows, 7, clients)
    assert config.federation.mode == ("synchronous" if way == SPLIT else way)
    assert config.task.labels == ("0", "1") and config.task.name == "sequence_classification"
    learning = config.optimizer
    assert (learning.name, learning.lr, learning.weight_decay) == ("adamw", recipe.learning_rate, 0.0)
    assert (learning.gradient_clipping, learning.schedule) == (recipe.clip_norm, "linear")
    assert learning.warmup_windows == recipe.warm_up_steps(70) == 0
    # Linear to nothing, as transformers' schedule: the first step has the whole rate.
    assert learning.learning_rate(0, windows) == pytest.approx(recipe.learning_rate)


def test_the_record_has_every_way_and_the_table_what_they_share(
    options: FineTuningOptions, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """With the launcher's run made up; what it would be given is tested above."""
    made: list[str] = []

    def finished(job: Any, commit: Any, measure: Any) -> dict[str, Any]:
        made.append(job.label)
        return {"settings": "x", "measures": {"accuracy": 0.5, "f1": 0.25}, "windows": 9, "tokens": 5, "seconds": 1.0,
                "bytes_per_token": 1234.0, "update_bytes_per_token": 234.0, "commit": commit}  # fmt: skip

    monkeypatch.setattr(benchmark, "finished", finished)
    study = [{"seed": 0, "dev": {"dev": {"accuracy": 0.75}}, "seconds": 2.0}]
    monkeypatch.setattr(benchmark, "run_study", lambda _: study)
    benchmark.bench_fine_tuning(options)
    assert made == [f"{SPLIT}, seed 0", "synchronous, seed 0", "sequential, seed 0"]
    record = json.loads(options.out.read_text())
    assert [row["way"] for row in record["rows"]] == [
        "in one place",
        "split, 1 client",
        "synchronous, 4 clients",
        "sequential, 4 clients",
    ]
    assert "settings" not in record["rows"][1] and record["train_examples"] == 70
    printed = table(record["rows"])
    assert printed in capsys.readouterr().out
    assert (
        "| in one place | 0 | 75.0 | 9 |  |  |" in printed
        and "| split, 1 client | 0 | 50.0 | 9 | 1,234 | 234 |" in printed
    )
