"""`fedbert-ds bench pipeline`: how busy clients behind slow links keep the body.

Systems take turns over the same text, body and links:
  centralized   the whole model in one process, its body under DeepSpeed; and that body alone
  ours          the real launcher with one rank, and real clients behind the links
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedbert_ds.bench.pipeline.ours import measure_ours
from fedbert_ds.bench.pipeline.report import draw, sentence, table
from fedbert_ds.bench.pipeline.settings import (
    CENTRALIZED,
    OURS,
    RUN_FILE,
    Baseline,
    PipelineOptions,
    Run,
    Setting,
    settings,
)
from fedbert_ds.bench.process import exit_on_sigterm, last_line, running
from fedbert_ds.config import RunConfig
from fedbert_ds.run_file import load_config
from fedbert_ds.telemetry.record import source_commit, write_record

LINKS = {"proxy": "a proxy that delays and limits", "netem": "the kernel's netem, in a network namespace"}


def bench_pipeline(options: PipelineOptions, baselines: Sequence[Baseline] = ()) -> None:
    """Run and print every setting, write record and picture. UserError names a failed run's log."""
    import torch

    from fedbert_ds.bench.device import describe
    from fedbert_ds.bench.text import prepare

    exit_on_sigterm()
    options.work.mkdir(parents=True, exist_ok=True)
    config = load_config(RUN_FILE, options.overrides_of(Setting(OURS)))
    shards, tokenizer = prepare(config, options.work / ("quick" if options.quick else "text"), options.clients)
    systems: dict[str, Callable[[Run], dict[str, Any]]] = {OURS: measure_ours, CENTRALIZED: measure_centralized}
    systems |= {baseline.name: baseline.measure for baseline in baselines}
    commit, rows = source_commit(), []
    print(f"links   {LINKS[options.links]}; {options.clients} clients, one body process", flush=True)
    for setting in settings(options, baselines):
        rows.append(systems[setting.system](Run(setting, options, shards, tokenizer)))
        print(sentence(rows[-1]), flush=True)
    write_record(
        options.out,
        command=options.command,
        commit=commit,
        rows=rows,
        links=options.links,
        device=describe(torch.device(options.device)),
        client_device=options.client_device,
        settings=_settings(config),
    )
    picture = options.out.with_suffix(".png")
    draw(picture, rows)
    print(f"\n{table(rows)}\n\nrecord  {options.out}\npicture {picture}", flush=True)


def measure_centralized(run: Run) -> dict[str, Any]:
    """The whole model, or in a variant the body alone, in one process."""
    command = [sys.executable, "-m", "fedbert_ds.bench.pipeline.centralized", "--config", str(RUN_FILE)]
    command += ["--tokenizer", str(run.tokenizer), "--shards", str(run.shards), *run.overrides]
    command += [] if run.setting.variant else ["--whole"]
    with running(command, run.log, run.options.device, answers=True) as process:
        measured = json.loads(last_line(process, run.log))
    return run.row(measured["tokens_per_second"], 1.0, clients=0, utilization_bound=1.0)


def _settings(config: RunConfig) -> dict[str, Any]:
    """Sections of the run file for the record, with no path of this machine in them."""
    tree: dict[str, Any] = json.loads(config.model_dump_json())
    tree["body"]["deepspeed"] = Path(tree["body"]["deepspeed"]).name
    return {name: tree[name] for name in ("model", "data", "window", "optimizer", "body", "federation")}
