"""`fedbert-ds bench modes`: every federated mode and centralized training on the same text, run after run.

Each federated run is the real launcher with its ranks and client processes; centralized training is a process of plain
torch. All run on the CPU, and a run that is complete already is not repeated.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.modes.comparison import Run, System, check_same_batches, draw, final, rows, table
from fedbert_ds.bench.process import end, environment
from fedbert_ds.config import RunConfig, load_config
from fedbert_ds.errors import RunError
from fedbert_ds.telemetry.metrics import read_metrics
from fedbert_ds.telemetry.progress import duration
from fedbert_ds.telemetry.record import SOURCE, source_commit, write_record

NUM_RANKS = 2
CENTRALIZED = System("centralized")
SYSTEMS = (
    CENTRALIZED,
    System("synchronous"),
    System("parallel", 1),
    System("parallel", 5),
    System("parallel", 50),
)
STALE_SYSTEMS = (
    CENTRALIZED,
    System("synchronous"),
    System("synchronous", staleness=1),
    System("synchronous", staleness=2),
    System("parallel", 1),
    System("parallel", 1, staleness=1),
)
QUICK_SYSTEMS = (CENTRALIZED, System("synchronous"), System("parallel", 5))
QUICK = (
    "run.windows=12",
    "tokenizer.vocab_size=500",
    "data.max_articles=12",
    "window.tokens=1024",
    "window.tokens_per_micro_batch=512",
    "optimizer.warmup_windows=2",
    "clients.expected=2",
    "clients.local=2",
)
"""What makes a run file a matter of a minute: it shows that everything works, and nothing else."""

LAUNCHER = SOURCE / "launchers" / "pretrain.py"
RUN_FILE = SOURCE / "configs" / "wikitext.yaml"
RESULT = "result.json"
"""Written into a run's folder last, so its presence says that the run is complete."""
LONGEST_SECONDS = 6 * 3600.0
"""A run that takes longer hangs."""


@dataclass(frozen=True)
class ModesOptions:
    """What a user gives the benchmark."""

    data: str
    """Source of the articles; see data.source of the run file."""
    out: Path
    """The record; its picture lies beside it as .png."""
    command: str
    """What the user typed, for the record."""
    work: Path = Path("runs/bench-modes")
    """Holds a run folder and a log for each system."""
    quick: bool = False
    staleness: bool = False
    """Compare exact windows with bounded staleness, not rarer averages."""
    overrides: tuple[str, ...] = ()
    """`section.key=value`, for every system alike."""


def bench_modes(options: ModesOptions) -> None:
    """Run what is not complete, then write record and picture and print the table.

    Raises a UserError when the settings or the text are wrong or a run fails, naming its log.
    """
    if not LAUNCHER.is_file() or not RUN_FILE.is_file():
        raise RunError(
            "bench modes runs launchers/pretrain.py: it needs the source tree, installed with pip install -e"
        )
    # A SIGTERM unwinds as Ctrl-C does, so that the run under way is ended.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    systems = QUICK_SYSTEMS if options.quick else STALE_SYSTEMS if options.staleness else SYSTEMS
    configs = {system: load_config(RUN_FILE, overrides_of(system, options)) for system in systems}
    commit = source_commit()
    reference = configs[CENTRALIZED].run.directory
    runs = [_finished(system, config, options, commit, reference) for system, config in configs.items()]
    check_same_batches(runs)
    _check_same_text([config.run.directory for config in configs.values()])
    final_rows = final(runs, CENTRALIZED.name)
    write_record(
        options.out,
        command=options.command,
        commit=commit,
        rows=rows(runs),
        settings=settings(configs[CENTRALIZED]),
        ranks=NUM_RANKS,
        text=_text_facts(reference),
        final=final_rows,
    )
    picture = options.out.with_suffix(".png")
    draw(picture, runs, CENTRALIZED.name)
    print(f"\n{table(final_rows, CENTRALIZED.name)}\n\nrecord  {options.out}\npicture {picture}", flush=True)


def overrides_of(system: System, options: ModesOptions) -> tuple[str, ...]:
    """The run file's overrides for one system; the user's come last but for where the run lies and its mode."""
    mode = () if system == CENTRALIZED else (f"federation.mode={system.name}",)
    every = (f"federation.average_every={system.average_every}",) if system.average_every else ()
    stale = (f"federation.staleness={system.staleness}",) if system.staleness else ()
    return (
        *(QUICK if options.quick else ()),
        *options.overrides,
        f"data.source={json.dumps([options.data])}",
        f"run.directory={json.dumps(str(options.work / system.slug))}",
        *mode,
        *every,
        *stale,
    )


def command_of(system: System, overrides: Sequence[str]) -> list[str]:
    """The command of one system's run."""
    run_file = ["--config", str(RUN_FILE), *overrides]
    if system == CENTRALIZED:
        return [sys.executable, "-m", "benchmarks.modes.centralized", *run_file]
    # The rendezvous stays on the loopback: a machine's own host name does not always resolve.
    ranks = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={NUM_RANKS}"]
    return [sys.executable, "-m", "torch.distributed.run", *ranks, str(LAUNCHER), *run_file]


def settings(config: RunConfig) -> dict[str, Any]:
    """A run's resolved settings for the record, with no path of this machine in them."""
    tree = json.loads(config.model_dump_json())
    del tree["run"]["directory"], tree["federation"]
    tree["body"]["deepspeed"] = config.body.deepspeed.name
    tree["data"]["source"] = [Path(source).name for source in config.data.source]
    return tree


def _finished(system: System, config: RunConfig, options: ModesOptions, commit: str | None, reference: Path) -> Run:
    """The system's run: read if it is complete with these very settings, else made; `reference` is complete."""
    folder = config.run.directory
    result = _read_result(folder, config)
    if result is None:
        _clear(folder)
        result = _make(system, config, options, commit)
    else:
        print(f"{system.label}: complete already", flush=True)
    return Run(
        system=system,
        windows=read_metrics(folder / "metrics.jsonl"),
        held_out_loss=result["held_out_loss"],
        unigram_loss=result["unigram_loss"],
        seconds=result["seconds"],
        commit=result["commit"],
        weight_difference=_weight_difference(folder / "hf", reference / "hf"),
    )


def _make(system: System, config: RunConfig, options: ModesOptions, commit: str | None) -> dict[str, Any]:
    folder = config.run.directory
    log = folder.with_name(f"{folder.name}.log")
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"{system.label}: {config.run.windows} windows, output in {log}", flush=True)
    started = time.monotonic()
    exit_code = _run(command_of(system, overrides_of(system, options)), log)
    seconds = time.monotonic() - started
    if exit_code:
        raise RunError(f"{system.label}: {_last_words(log)} (see {log})")
    held_out_loss, unigram_loss = _evaluate(folder, config)
    result = {
        "settings": _fingerprint(config),
        "commit": commit,
        "seconds": seconds,
        "held_out_loss": held_out_loss,
        "unigram_loss": unigram_loss,
    }
    scratch = folder / f"{RESULT}.part"
    scratch.write_text(json.dumps(result), encoding="utf-8")
    os.replace(scratch, folder / RESULT)
    print(f"{system.label}: {duration(seconds)}, held-out loss {held_out_loss:.3f}", flush=True)
    return result


def _run(command: Sequence[str], log: Path) -> int:
    """Run a command to its end and return its exit code; whatever ends this process ends the command first."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # The same numbers on every machine: on the CPU, and one thread each.
            env=environment("cpu"),
            # Ctrl-C comes to this process alone, which then ends the run in order.
            start_new_session=True,
        )
    try:
        return process.wait(timeout=LONGEST_SECONDS)
    except subprocess.TimeoutExpired:
        raise RunError(f"a run took more than {LONGEST_SECONDS / 3600:.0f} hours (see {log})") from None
    finally:
        end(process, patience=90)


def _evaluate(folder: Path, config: RunConfig) -> tuple[float, float]:
    """(loss of the final model, loss of word frequency alone) on the held-out articles: the same targets for all."""
    import torch

    from fedbert_ds.data.corpus import read_articles
    from fedbert_ds.data.masking import encode
    from fedbert_ds.data.tokenizer import load_tokenizer
    from fedbert_ds.evaluation.masked_lm import evaluate_masked_lm

    torch.set_num_threads(1)
    length = config.data.sequence_length
    tokenizer = load_tokenizer(str(folder / "hf"))
    shards = [str(path) for path in _shards(folder)]
    result = evaluate_masked_lm(
        folder / "hf",
        [str(folder / "held_out.jsonl")],
        seed=config.run.seed,
        mask_probability=config.data.mask_probability,
        sequence_length=length,
        train_counts=encode(read_articles(shards), tokenizer, length).token_counts(len(tokenizer)),
        device="cpu",
    )
    assert result.unigram_loss is not None
    return result.loss, result.unigram_loss


def _weight_difference(folder: Path, reference: Path) -> float:
    """Largest difference of a weight; key biases apart: their true gradient is zero, and Adam steps on noise."""
    from safetensors.torch import load_file

    mine, theirs = (load_file(path / "model.safetensors") for path in (folder, reference))
    names = [name for name in theirs if not name.endswith("key.bias")]
    return max((mine[name] - theirs[name]).abs().max().item() for name in names)


def _read_result(folder: Path, config: RunConfig) -> dict[str, Any] | None:
    path = folder / RESULT
    if not path.is_file():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    return result if result["settings"] == _fingerprint(config) else None


def _fingerprint(config: RunConfig) -> str:
    """Of everything the run file says, and of the DeepSpeed file it names."""
    digest = hashlib.sha256(config.model_dump_json().encode())
    digest.update(config.body.deepspeed.read_bytes())
    return digest.hexdigest()


def _clear(folder: Path) -> None:
    """Remove a run that is incomplete or has other settings; RunError for a folder this benchmark did not make."""
    import shutil

    if not folder.exists():
        return
    if not folder.with_name(f"{folder.name}.log").is_file():
        raise RunError(f"{folder}: not a run of this benchmark; name another folder with --work")
    shutil.rmtree(folder)


def _check_same_text(folders: Sequence[Path]) -> None:
    first, *others = [(folder, _text_digest(folder)) for folder in folders]
    for folder, digest in others:
        if digest != first[1]:
            raise RunError(f"{folder}: not the shards and word pieces of {first[0]}; remove both and run again")


def _text_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in (folder / "held_out.jsonl", *_shards(folder), folder / "tokenizer" / "tokenizer.json"):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _text_facts(folder: Path) -> dict[str, Any]:
    """How the text was dealt, and a digest of it, for a reader who has the same text."""
    facts = json.loads((folder / "text.json").read_text(encoding="utf-8"))
    names = ("articles", "held_out", "shard_articles", "shard_characters")
    return {name: facts[name] for name in names} | {"sha256": _text_digest(folder)}


def _shards(folder: Path) -> list[Path]:
    return sorted((folder / "clients").glob("*/shard.jsonl"))


def _last_words(log: Path) -> str:
    """The error line of ours in a log, or else its last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    ours = [line.removeprefix("fedbert-ds: ") for line in lines if line.startswith("fedbert-ds: ")]
    return [*(lines or ["it ended without a word"]), *ours][-1]
