"""Runs with evaluations equal those without, bit by bit; losses are those of the merged model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.cluster import ZERO, aggregator_section, run_file, run_jobs, write_text
from safetensors.torch import load_file

from fedbert_ds.data.corpus import read_articles
from fedbert_ds.data.held_out import evaluation_batch, keep_apart
from fedbert_ds.data.masking import encode
from fedbert_ds.data.tokenizer import load_tokenizer
from fedbert_ds.telemetry.evaluations import best_of, read_evaluations

pytestmark = pytest.mark.timeout(1200)

DROPOUT = {"dropout": 0.1}
PARALLEL = {"mode": "parallel", "average_every": 2}
HELD_OUT = {"client_held_out": 0.3}
WINDOWS = 4
CASES: dict[str, dict[str, Any]] = {
    # An aggregator waits for its run from the beginning on.
    "elsewhere": {"stage": 2, "model": DROPOUT, "aggregator": True},
    "elsewhere, parallel": {"stage": 2, "federation": PARALLEL, "aggregator": True},
    "synchronous, stage 0": {"stage": 0, "model": DROPOUT},
    "synchronous, stage 2": {"stage": 2, "optimizer": {"gradient_clipping": 1.0}},
    "synchronous, stage 3, layers": {"stage": 3, "cut": {"layers": 1}, "model": DROPOUT},
    "synchronous, rows": {"stage": 1, "cut": "rows", "model": DROPOUT},
    "synchronous, waits": {"stage": 2, "model": DROPOUT, "clients": {"on_loss": "wait"}},
    "synchronous, some": {"stage": 2, "federation": {"participants": 2}},
    "parallel": {"stage": 2, "model": DROPOUT, "federation": {**PARALLEL, "average_scope": "embeddings"}},
    "parallel, changes, int8": {"stage": 2, "federation": PARALLEL, "wire": {"updates": "int8", "hidden": "int8"}},
    "sequential": {"stage": 2, "model": DROPOUT, "federation": {"mode": "sequential", "average_every": 2}},
    "whole": {"stage": 2, "cut": "whole", "model": DROPOUT, "federation": PARALLEL},
}
MERGED_EXACTLY = ("synchronous, stage 0", "synchronous, rows", "synchronous, stage 3, layers")
"""Whose clients hold what the merged model holds; codecs are fp32."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case with evaluations every window but for the first, and without."""
    folder = tmp_path_factory.mktemp("runs")
    data = write_text(folder)
    jobs: list[dict[str, Any]] = []
    for name, case in CASES.items():
        for kind, every in (("with", 1), ("without", None)):
            sections = {key: value for key, value in case.items() if key not in ("stage", "aggregator")}
            if case.get("aggregator"):
                sections["aggregator"] = aggregator_section(folder)
            run = {"windows": WINDOWS, "evaluate_every": every, "save_every": 2}
            if every and not case.get("aggregator"):
                run["keep_best"] = True
            tree = run_file(
                folder, f"{name} {kind}", run=run, data=HELD_OUT, window={"order": "fixed"},
                body={"deepspeed": str(ZERO / f"zero{case['stage']}.json")}, **sections,
            )  # fmt: skip
            jobs.append({"config": tree, "resume": False, "data": data})
    stopped = run_file(
        folder, "stopped", run={"windows": WINDOWS}, data=HELD_OUT, window={"order": "fixed"}, model=DROPOUT,
        body={"deepspeed": str(ZERO / "zero0.json")},
    )  # fmt: skip
    jobs.append({"config": stopped, "resume": False, "data": data, "mutation": "stopped before window 3"})
    run_jobs(folder, jobs)
    return folder


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def digest(weights: Path) -> str:
    content = hashlib.sha256()
    for name, tensor in sorted(load_file(weights).items()):
        content.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return content.hexdigest()


def final_weights(run: Path) -> list[str]:
    """Of the merged model; of both halves, where another party has one."""
    model = run / "hf" / "model.safetensors"
    if model.is_file():
        return [digest(model)]
    elsewhere = Path(f"{run}-aggregator")
    return [digest(path) for place in (run / "body", elsewhere) for path in sorted(place.glob("*.safetensors"))]


@pytest.mark.parametrize("name", CASES)
def test_an_evaluation_moves_nothing(folder: Path, name: str) -> None:
    runs = folder / f"{name} with", folder / f"{name} without"
    assert losses(runs[0]) == losses(runs[1]) and len(losses(runs[0])) == WINDOWS
    weights = [final_weights(run) for run in runs]
    assert weights[0] == weights[1] and weights[0]
    assert not (runs[1] / "evaluations.jsonl").exists()


@pytest.mark.parametrize("name", CASES)
def test_every_client_tells_its_loss_each_time(folder: Path, name: str) -> None:
    evaluations = read_evaluations(folder / f"{name} with" / "evaluations.jsonl")
    assert [evaluation.window for evaluation in evaluations] == list(range(1, WINDOWS + 1))
    for evaluation in evaluations:
        assert evaluation.clients.keys() == {"ada", "bo", "cy"} and not evaluation.missing
        assert 2.0 < evaluation.loss <= evaluation.clients[str(evaluation.worst)].loss < 8.0
    assert len({evaluation.loss for evaluation in evaluations}) == WINDOWS
    sizes = [{name: loss.masked_tokens for name, loss in one.clients.items()} for one in evaluations]
    assert all(size == sizes[0] for size in sizes), "every evaluation predicts the same tokens"


@pytest.mark.parametrize("name", MERGED_EXACTLY)
def test_the_last_loss_is_that_of_the_merged_model(folder: Path, name: str) -> None:
    run = folder / f"{name} with"
    last = read_evaluations(run / "evaluations.jsonl")[-1]
    for client, told in last.clients.items():
        assert told.loss == pytest.approx(plain_loss(folder, run / "hf", client), rel=1e-5)


def plain_loss(folder: Path, model_folder: Path, client: str) -> float:
    """By transformers alone, sequence by sequence."""
    from transformers import AutoModelForMaskedLM

    model = AutoModelForMaskedLM.from_pretrained(model_folder).eval()
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    _, held_out = keep_apart(list(read_articles([str(folder / f"{client}.jsonl")])), HELD_OUT["client_held_out"])
    batch = evaluation_batch(
        encode(held_out, tokenizer, 32), tokenizer, mask_probability=0.15, whole_word=False, seed=3, client=client,
        max_tokens=65536,
    )  # fmt: skip
    targets = torch.full_like(batch.input_ids, -100)
    targets[batch.masked_positions] = batch.labels
    total = 0.0
    with torch.no_grad():
        for ids, labels in zip(batch.input_ids.split(batch.lengths), targets.split(batch.lengths), strict=True):
            logits = model(input_ids=ids.unsqueeze(0)).logits[0]
            total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
    return total / len(batch.labels)


def test_the_best_model_is_the_one_that_the_lowest_loss_is_of(folder: Path) -> None:
    for name, case in CASES.items():
        run = folder / f"{name} with"
        if case.get("aggregator"):
            continue
        best = best_of(read_evaluations(run / "evaluations.jsonl"))
        assert read_evaluations(run / "hf-best" / "evaluation.json") == [best], name
        if best is not None and best.window == WINDOWS:
            assert final_weights(run) == [digest(run / "hf-best" / "model.safetensors")], name


def test_stopped_there_the_run_has_the_best_model(folder: Path, best_before_3: Callable[[], Mapping[str, str]]) -> None:
    best = best_before_3()
    assert best["of 3"] == digest(folder / "stopped" / "hf" / "model.safetensors")
    assert best["of 3"] != digest(folder / "synchronous, stage 0 with" / "hf" / "model.safetensors")


@pytest.fixture
def best_before_3(tmp_path: Path) -> Callable[[], Mapping[str, str]]:
    def run() -> Mapping[str, str]:
        data = write_text(tmp_path)
        tree = run_file(
            tmp_path, "early",
            run={"windows": WINDOWS, "evaluate_every": 3, "keep_best": True},
            data=HELD_OUT, window={"order": "fixed"}, model=DROPOUT,
            body={"deepspeed": str(ZERO / "zero0.json")},
        )  # fmt: skip
        run_jobs(tmp_path, [{"config": tree, "resume": False, "data": data, "mutation": "evaluations grow worse"}])
        (best,) = read_evaluations(tmp_path / "early" / "hf-best" / "evaluation.json")
        return {f"of {best.window}": digest(tmp_path / "early" / "hf-best" / "model.safetensors")}

    return run
