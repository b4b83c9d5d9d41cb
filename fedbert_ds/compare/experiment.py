"""`fedbert-ds compare`: make every run that is not there yet, then table, record and picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from fedbert_ds.atomic_write import write_text
from fedbert_ds.bench.process import exit_on_sigterm
from fedbert_ds.compare import held_out
from fedbert_ds.compare.alone import EVALUATIONS, read_evaluations
from fedbert_ds.compare.attempts import log_of
from fedbert_ds.compare.baselines import baselines
from fedbert_ds.compare.plan import CompareOptions, Plan
from fedbert_ds.compare.runs import Job, client_costs, finished, text_digest, text_facts
from fedbert_ds.compare.systems import EACH_ALONE, System
from fedbert_ds.compare.table import draw, table, verdict
from fedbert_ds.compare.tasks import Scores, scores
from fedbert_ds.config import RunConfig
from fedbert_ds.errors import RunError
from fedbert_ds.evaluation.masked_lm import load_masked_lm
from fedbert_ds.evaluation.word_table import mean_cosine
from fedbert_ds.folder_lock import holds_nothing, locked
from fedbert_ds.server.prepare import is_prepared, prepare_text
from fedbert_ds.telemetry.metrics import read_metrics, summary
from fedbert_ds.telemetry.record import source_commit, write_record

COMPARISON = "comparison.json"
"""In the folder: the settings of what is compared there."""
COSTS = (
    *("bytes_per_token", "update_bytes_per_token", "client_flops_per_token", "client_peak_memory_mb"),
    *("seconds", "seconds_in_windows", "windows", "tokens"),
)
"""Of a row: what a client pays, and how long it takes."""


def compare(options: CompareOptions) -> None:
    """Train what is not there yet, then write table.md, table.json and table.png and print.

    UserErrors, one line, before the first run for what was typed, for text, and for a folder of
    another comparison; RunError, with the log, for a run that fails.
    """
    exit_on_sigterm()
    torch.set_num_threads(1)
    commit = source_commit()
    plan = Plan.of(options)
    _claim(plan)
    with locked(options.out, "--out"):
        _make(plan, commit)


def _make(plan: Plan, commit: str | None) -> None:
    batches = {seed: _prepared(plan, seed) for seed in plan.seeds}
    rows: list[dict[str, Any]] = []
    for seed in plan.seeds:
        rows += _baseline_rows(plan, seed, batches[seed])
        for system in plan.systems:
            rows.append(_row(plan, system, seed, batches[seed], commit))
            # After each: there is a table of what is finished long before the last.
            text = _write(plan, rows, commit)
    print(f"\n{text}\n\ntable   {plan.options.out / 'table.md'}, table.json, table.png", flush=True)


def _claim(plan: Plan) -> None:
    """RunError unless the folder is new or of this comparison; systems, seeds and tasks may be
    added.
    """
    out = plan.options.out
    path = out / COMPARISON
    if not path.is_file():
        if out.exists() and not (out.is_dir() and holds_nothing(out)):
            raise RunError(f"{out}: is no folder of a comparison; name a new one with --out")
        out.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(plan.settings, indent=2) + "\n")
        return
    # What an earlier version did not write was what is now the default.
    defaults = _flat(RunConfig().model_dump(mode="json"))
    before, now = defaults | _flat(json.loads(path.read_text(encoding="utf-8"))), _flat(plan.settings)
    for key in sorted(now):
        if before.get(key) != now[key]:
            raise RunError(
                f"{out}: holds a comparison with {key} {before.get(key)}, now {now[key]}; change that back, or name "
                "another --out"
            )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _prepared(plan: Plan, seed: int) -> held_out.Batches:
    """The held-out text of a seed's clients, whose shards and vocabulary are made once."""
    text, config = plan.text(seed), plan.text_config(seed)
    if not is_prepared(text):
        text.path.mkdir(parents=True, exist_ok=True)
        _, facts = prepare_text(config, text)
        assert facts is not None
        print(f"text    {facts.sentence}", flush=True)
    return held_out.held_out_batches(config, text)


def _baseline_rows(plan: Plan, seed: int, batches: held_out.Batches) -> list[dict[str, Any]]:
    """Rows of what no system trained."""
    config, with_model = plan.text_config(seed), plan.tasks is not None
    found = baselines(config, plan.text(seed), batches, with_model, plan.options.device)
    return [
        {
            "system": name,
            "average_every": None,
            "seed": seed,
            **_figures(plan, losses),
            **(_model_figures(plan, seed, name.replace(" ", "-"), model) if model is not None else {}),
        }
        for name, (losses, model) in found.items()
    ]


def _row(plan: Plan, system: System, seed: int, batches: held_out.Batches, commit: str | None) -> dict[str, Any]:
    """A system's figures; its runs are made if they are not complete."""
    jobs, results = plan.jobs(system, seed), {}
    for client, job in jobs.items():
        theirs = {client: batches[client]} if client else batches
        results[client] = finished(job, commit, partial(_measured, job, theirs))
        if system.is_federated and text_digest(job.folder.path) != text_digest(plan.text(seed).path):
            raise RunError(f"{job.folder.path}: its text is not that of {plan.text(seed).path}; remove both")
    losses = {client: one for result in results.values() for client, one in result["clients"].items()}
    row = {
        "system": system.name,
        "average_every": system.average_every,
        "server_lr": system.server_lr,
        "seed": seed,
        **_figures(plan, held_out.from_json(losses)),
        # What one client pays; of clients alone, the one that pays most.
        **{name: max(result[name] for result in results.values()) for name in COSTS},
        "commit": next(iter(results.values()))["commit"],
    }
    if system in EACH_ALONE:
        evaluations = {plan.owners[client]: result["evaluations"] for client, result in results.items()}
        at_the_end = {owner: ones[-1]["loss"] for owner, ones in evaluations.items()}
        return row | {"held_out_at_the_end": at_the_end, "own_evaluations": evaluations}
    return row | _model_figures(plan, seed, system.slug, str(jobs[""].folder.model))


def _measured(job: Job, batches: held_out.Batches) -> dict[str, Any]:
    """A finished run's losses on these clients' held-out text, and what it cost."""
    whole = summary(read_metrics(job.folder.metrics))
    # A run without clients says what it took in its own log.
    costs = client_costs(sorted(job.folder.clients.glob("*/log.txt")) or [log_of(job.folder.path)])
    if costs is None:
        raise RunError(f"{job.folder.path}: no client said what it took; see {log_of(job.folder.path)}")
    losses = held_out.losses_of(str(job.folder.model), batches, job.config.run.seed, job.device)
    alone = (job.folder.path / EVALUATIONS).is_file()
    return {
        "clients": held_out.as_json(losses),
        "held_out_loss": held_out.overall(losses),
        "bytes_per_token": whole.bytes_per_token,
        "update_bytes_per_token": whole.update_bytes_per_token,
        "client_flops_per_token": costs.flops_per_token,
        "client_peak_memory_mb": costs.peak_memory_mb,
        "seconds_in_windows": whole.seconds,
        "windows": whole.windows,
        "tokens": whole.tokens,
        **({"evaluations": read_evaluations(job.folder)} if alone else {}),
    }


def _figures(plan: Plan, losses: held_out.Losses) -> dict[str, Any]:
    """Held-out losses of a row, by the owners' names."""
    named = {plan.owners[client]: losses[client] for client in plan.clients}
    return {
        "held_out_loss": held_out.overall(losses),
        "worst_client": max(named, key=lambda name: named[name].loss),
        "held_out": {name: one.loss for name, one in named.items()},
        "masked_tokens": {name: one.masked_tokens for name, one in named.items()},
    }


def _model_figures(plan: Plan, seed: int, slug: str, model: str) -> dict[str, Any]:
    """What is asked of one model for all owners, by its checkpoint."""
    words: Any = load_masked_lm(model, seed).get_input_embeddings().weight
    return {"word_cosine": mean_cosine(words), "glue": _scores(plan, seed, slug, model)}


def _scores(plan: Plan, seed: int, slug: str, model: str) -> Scores:
    """A model's scores on every task; none without tasks."""
    if plan.tasks is None:
        return {}
    folder = plan.options.out / f"seed-{seed}" / "glue" / slug
    return scores(plan.tasks, model, folder, plan.options.command, plan.options.device)


def _write(plan: Plan, rows: list[dict[str, Any]], commit: str | None) -> str:
    """Write table, record and picture of these rows; the table and its verdict."""
    out = plan.options.out
    text = "\n\n".join([table(rows), *verdict(rows)])
    write_record(
        out / "table.json",
        command=plan.options.command,
        commit=commit,
        rows=rows,
        settings=plan.settings,
        text={str(seed): text_facts(plan.text(seed).path) for seed in plan.seeds},
    )
    write_text(out / "table.md", text + "\n")
    draw(out / "table.png", rows)
    return text
