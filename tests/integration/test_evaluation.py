"""Runs with evaluations equal those without, bit by bit; losses are those of the merged model."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.chaos import Outcome, train
from integration.chaos_process import Kill
from integration.cluster import ZERO, aggregator_section, run_file, run_jobs, write_text
from integration.federation import fork_quickly
from safetensors.torch import load_file

from fedbert_ds.data.corpus import read_articles
from fedbert_ds.data.held_out import evaluation_batch, keep_apart
from fedbert_ds.data.masking import encode
from fedbert_ds.data.tokenizer import load_tokenizer
from fedbert_ds.errors import RunOver
from fedbert_ds.telemetry.evaluations import best_of, read_evaluations
from fedbert_ds.wire.address_file import look_up

pytestmark = pytest.mark.timeout(1200)
fork_quickly()

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
    for name in ("synchronous, stage 0", "parallel"):
        (tree,) = [
            copy.deepcopy(job["config"])
            for job in jobs
            if job["config"]["run"]["directory"] == str(folder / f"{name} with")
        ]
        tree["run"]["directory"] = str(folder / f"{name} resumed")
        jobs.append({"config": tree, "resume": False, "data": data, "mutation": "stopped before window 3"})
        jobs.append({"config": tree, "resume": True, "data": data})
    for name, every, mutation in (("stopped", None, "stopped before window 3"), ("early", 3, "evaluations grow worse")):
        run = {"windows": 9, "evaluate_every": every, "keep_best": every is not None}
        run["early_stopping_patience"] = 1 if every else None
        tree = run_file(
            folder, name, run=run, data=HELD_OUT, window={"order": "fixed"}, model=DROPOUT,
            body={"deepspeed": str(ZERO / "zero0.json")},
        )  # fmt: skip
        jobs.append({"config": tree, "resume": False, "data": data, "mutation": mutation})
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


def test_stopped_there_the_run_has_the_best_model(folder: Path) -> None:
    """Losses were made to rise, so that of window 3 stays the lowest, and the run ends early."""
    early = folder / "early"
    assert [one.window for one in read_evaluations(early / "evaluations.jsonl")] == [3, 6]
    (best,) = read_evaluations(early / "hf-best" / "evaluation.json")
    assert best.window == 3
    assert digest(early / "hf-best" / "model.safetensors") == digest(folder / "stopped" / "hf" / "model.safetensors")
    assert final_weights(early) != final_weights(folder / "stopped")
    assert len(losses(early)) == 6, "of 9 windows"
    with pytest.raises(RunOver):  # it is complete
        look_up(str(early / "server.address"))


@pytest.mark.parametrize("name", ["synchronous, stage 0", "parallel"])
def test_a_resumed_run_equals_the_uninterrupted_one(folder: Path, name: str) -> None:
    whole, resumed = folder / f"{name} with", folder / f"{name} resumed"
    assert final_weights(resumed) == final_weights(whole) and losses(resumed) == losses(whole)
    assert (resumed / "evaluations.jsonl").read_text() == (whole / "evaluations.jsonl").read_text()
    for file in ("evaluation.json", "model.safetensors"):
        assert (resumed / "hf-best" / file).read_bytes() == (whole / "hf-best" / file).read_bytes()


DEATHS = [
    ("synchronous", Kill("ada", "evaluation", 3)),
    ("synchronous", Kill("rank 1", "evaluation", 3)),
    ("parallel", Kill("bo", "evaluation", 3)),
    ("whole", Kill("cy", "evaluation", 3)),
    ("synchronous-elsewhere", Kill("bo", "evaluation", 3)),
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Outcome, str]]:
    """By mode, what a run comes to, and its evaluations."""
    place = tmp_path_factory.mktemp("undisturbed")

    @cache
    def of(mode: str) -> tuple[Outcome, str]:
        return train(place, mode, mode, [], evaluates=True), evaluations_in(place / mode)

    return of


def evaluations_in(place: Path) -> str:
    return (place / "run" / "evaluations.jsonl").read_text()


@pytest.mark.parametrize(("mode", "kill"), DEATHS, ids=str)
def test_a_process_that_dies_in_an_evaluation_leaves_no_trace(
    tmp_path: Path, undisturbed: Callable[[str], tuple[Outcome, str]], mode: str, kill: Kill
) -> None:
    """In a run that waits for lost clients."""
    came_to = train(tmp_path, "killed", mode, [kill], evaluates=True)
    assert (came_to, evaluations_in(tmp_path / "killed")) == undisturbed(mode)
