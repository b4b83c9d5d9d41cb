"""Every shipped run file trains and hands over a model, at toy size with all else kept."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from integration.cluster import run_jobs, write_text
from integration.test_fine_tuning import TASKS, write_examples
from transformers import AutoConfig

from fedbert_ds.config import ModelSection, RunConfig
from fedbert_ds.data.tokenizer import load_tokenizer
from fedbert_ds.init.choices import Wanted, choose
from fedbert_ds.init.command import written
from fedbert_ds.model.checkpoint import build_model
from fedbert_ds.model.heads import auto_class
from fedbert_ds.run_file import load_config

pytestmark = pytest.mark.timeout(900)

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SCOPES = ("embeddings", "head", "embeddings+head")
VARIANTS = {
    **{path.stem: (path.name, ()) for path in sorted(CONFIGS.glob("*.yaml"))},
    **{f"{period}-{scope}": (f"fedbert-parallel-{period}.yaml", (f"federation.average_scope={scope}",))
       for period in ("5-of-10", "50-of-500") for scope in SCOPES},
    **{f"bert-{mode}": (f"fedbert-{mode}.yaml", ("model.architecture=bert",))
       for mode in ("parallel-5-of-10", "sequential")},
}  # fmt: skip
VARIANTS["domain-adaptation-of-modernbert"] = (
    "domain-adaptation.yaml",
    ("model.checkpoint=answerdotai/ModernBERT-base", "model.dropout=0.0"),
)
"""{name: (run file, overrides)}: all files, and what their comments say to set."""
WRITTEN = tempfile.TemporaryDirectory()
"""Run files of `fedbert-ds init`: where exchanges cost nothing, and where they cost much."""
for kind, speed in (("exact", lambda config: 1e5), ("fast", lambda config: 1e5 * config.federation.average_every)):
    written_file = Path(WRITTEN.name) / f"init-{kind}.yaml"
    written_file.write_text(written(choose(Wanted(), speed), Wanted()), encoding="utf-8")
    VARIANTS[written_file.stem] = (str(written_file), ())
CHECKPOINTS: dict[str, Any] = {
    "bert-base-uncased": "bert", "bert-base-cased": "bert", "ModernBERT-base": "modernbert"
}  # fmt: skip
LABELLED = {"fine-tuning-sentences": "texts", "fine-tuning-entities": "words"}
WINDOWS = 6
PERIOD = {"fedbert-parallel-5-of-10.yaml": 3, "fedbert-parallel-50-of-500.yaml": 2}
"""Windows of a round, of 6: half of the run, and more rounds than two."""


def toy(folder: Path, name: str) -> dict[str, Any]:
    """The run file with small sizes and no hub, as a mapping."""
    file, overrides = VARIANTS[name]
    shipped = load_config(CONFIGS / file, overrides)
    period = 1 if shipped.federation.average_every == 1 else PERIOD.get(file, 2)
    small = [
        f"run.directory={folder / name}", f"run.windows={WINDOWS}", "run.save_every=1000",
        "model.num_hidden_layers=2", "model.hidden_size=32", "model.num_attention_heads=2",
        "model.intermediate_size=48", "model.max_position_embeddings=40", f"tokenizer.path={folder / 'tokenizer'}",
        "data.sequence_length=32", "window.tokens=300", "window.tokens_per_micro_batch=96",
        f"optimizer.warmup_windows={min(2, shipped.optimizer.warmup_windows)}",
        f"federation.average_every={period}", "clients.expected=3", "clients.local=0", "clients.join_timeout=60",
        "server.port=0", "server.host=127.0.0.1", "server.tls=null", "server.advertise=null",
    ]  # fmt: skip
    if shipped.model.embedding_size is not None:
        small.append("model.embedding_size=16")
    if shipped.model.checkpoint is not None:
        small.append(f"model.checkpoint={folder / Path(shipped.model.checkpoint).name}")
    if shipped.data.shards == "source":
        # For local clients, and these are none of the server's.
        small.append("data.shards=equal")
    config = load_config(CONFIGS / file, [*overrides, *small])
    tree: dict[str, Any] = json.loads(config.model_dump_json(exclude_none=True))
    # Its null is not its default.
    return tree | {"body": {"deepspeed": None} | tree["body"]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("configs")
    data = write_text(folder)
    for name, architecture in CHECKPOINTS.items():
        section = ModelSection(
            architecture=architecture, hidden_size=32, num_attention_heads=2, max_position_embeddings=40
        )
        model = build_model(section, len(load_tokenizer(str(folder / "tokenizer"))), 0, seed=1)
        model.save_pretrained(folder / name)
    words = json.loads(Path(data["ada"]).read_text().splitlines()[0])["text"].split()
    labelled = write_examples(folder, words)

    def job(name: str) -> dict[str, Any]:
        tree = toy(folder, name)
        kind = LABELLED.get(name)
        if kind is not None:
            # The shipped file's labels and columns are those of its own files.
            tree["task"] = TASKS[kind]
        return {"config": tree, "resume": False, "data": data if kind is None else labelled[kind]}

    run_jobs(folder, [job(name) for name in VARIANTS])
    return folder


@pytest.mark.parametrize("name", VARIANTS)
def test_it_trains_and_hands_over_a_model(finished: Path, name: str) -> None:
    file, overrides = VARIANTS[name]
    shipped = load_config(CONFIGS / file, overrides)
    rows = [json.loads(line) for line in (finished / name / "metrics.jsonl").read_text().splitlines()]
    assert [row["window"] for row in rows] == list(range(WINDOWS)) and all(row["loss"] > 0 for row in rows)
    checkpoint = shipped.model.checkpoint
    expected = shipped.model.architecture if checkpoint is None else CHECKPOINTS[Path(checkpoint).name]
    assert AutoConfig.from_pretrained(finished / name / "hf").model_type == expected
    config = AutoConfig.from_pretrained(finished / name / "hf")
    _, loading = auto_class(config).from_pretrained(finished / name / "hf", output_loading_info=True)
    assert not any(loading.values()), loading


@pytest.mark.parametrize("name", VARIANTS)
def test_only_sizes_and_places_were_changed(finished: Path, name: str) -> None:
    """Or it would not be the shipped file that ran."""
    file, overrides = VARIANTS[name]
    shipped, ran = load_config(CONFIGS / file, overrides), load_config(finished / name / "config.yaml")
    sizes = {"run": {"seed", "trace"}, "model": {"architecture", "initializer_range", "dropout", "attention_dropout"}}
    kept: dict[str, set[str]] = sizes | {
        "data": set(type(shipped.data).model_fields) - {"sequence_length", "shards"},
        "window": set(type(shipped.window).model_fields) - {"tokens", "tokens_per_micro_batch"},
        "optimizer": set(type(shipped.optimizer).model_fields) - {"warmup_windows"},
        "body": set(type(shipped.body).model_fields),
        "federation": set(type(shipped.federation).model_fields) - {"average_every"},
        "wire": set(type(shipped.wire).model_fields),
    }
    for section, keys in kept.items():
        for key in keys:
            assert getattr(getattr(ran, section), key) == getattr(getattr(shipped, section), key), f"{section}.{key}"
    assert ran.task.name == shipped.task.name
    assert isinstance(ran, RunConfig) and ran.cut == shipped.cut and ran.kernels == shipped.kernels
