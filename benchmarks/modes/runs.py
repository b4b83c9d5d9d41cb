"""Runs that are made once: a run that is complete with the same settings is read, not repeated."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.modes.comparison import ClientCosts, Run
from benchmarks.modes.systems import ModesOptions, System, command_of, overrides_of
from fedbert_ds.atomic_write import write_text
from fedbert_ds.bench.process import end, environment
from fedbert_ds.config import RunConfig
from fedbert_ds.errors import RunError
from fedbert_ds.server.run_folder import RunFolder
from fedbert_ds.telemetry.metrics import read_metrics
from fedbert_ds.telemetry.progress import duration

RESULT = "result.json"
"""Written into a run's folder last, so its presence says that the run is complete."""
LONGEST_SECONDS = 6 * 3600.0
"""A run that takes longer hangs."""


def finished(system: System, config: RunConfig, options: ModesOptions, commit: str | None, reference: Path) -> Run:
    """The run: read if complete with these settings, else made. `reference` is complete."""
    folder = config.run.directory
    result = _read_result(folder, config)
    if result is None:
        _clear(folder)
        result = _make(system, config, options, commit)
    else:
        print(f"{system.label}: complete already", flush=True)
    return Run(
        system=system,
        windows=read_metrics(RunFolder(folder).metrics),
        held_out_loss=result["held_out_loss"],
        unigram_loss=result["unigram_loss"],
        seconds=result["seconds"],
        commit=result["commit"],
        weight_difference=_weight_difference(RunFolder(folder).model, RunFolder(reference).model),
        client=client_costs(RunFolder(folder)),
    )


def client_costs(folder: RunFolder) -> ClientCosts | None:
    """The largest of what clients printed at their end; None for a run without clients."""
    lines = "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.clients.glob("*/log.txt")))
    found = re.findall(r"peak memory (\d+) MB, ([\d.]+) MFLOP per token", lines)
    if not found:
        return None
    return ClientCosts(max(float(flops) for _, flops in found) * 1e6, max(int(memory) for memory, _ in found))


def run_to_end(command: Sequence[str], log: Path) -> int:
    """Run a command to its end and return its exit code; it ends before this process does."""
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


def evaluate(folder: Path, config: RunConfig) -> tuple[float, float]:
    """Losses on the held-out articles: (final model, word frequency alone), same targets."""
    import torch

    from fedbert_ds.data.corpus import read_articles
    from fedbert_ds.data.masking import encode
    from fedbert_ds.data.tokenizer import load_tokenizer
    from fedbert_ds.evaluation.masked_lm import evaluate_masked_lm

    torch.set_num_threads(1)
    length, model = config.data.sequence_length, RunFolder(folder).model
    tokenizer = load_tokenizer(str(model))
    shards = [str(path) for path in _shards(folder)]
    result = evaluate_masked_lm(
        model,
        [str(RunFolder(folder).held_out)],
        seed=config.run.seed,
        mask_probability=config.data.mask_probability,
        sequence_length=length,
        train_counts=encode(read_articles(shards), tokenizer, length).token_counts(len(tokenizer)),
        device="cpu",
    )
    assert result.unigram_loss is not None
    return result.loss, result.unigram_loss


def check_same_text(folders: Sequence[Path]) -> None:
    """RunError unless all runs have the same shards, held-out text and word pieces."""
    first, *others = [(folder, _text_digest(folder)) for folder in folders]
    for folder, digest in others:
        if digest != first[1]:
            raise RunError(f"{folder}: not the shards and word pieces of {first[0]}; remove both and run again")


def text_facts(folder: Path) -> dict[str, Any]:
    """How the text was dealt, and a digest of it, for a reader who has the same text."""
    facts = json.loads(RunFolder(folder).text_facts.read_text(encoding="utf-8"))
    names = ("articles", "held_out", "shard_articles", "shard_characters")
    return {name: facts[name] for name in names} | {"sha256": _text_digest(folder)}


def _make(system: System, config: RunConfig, options: ModesOptions, commit: str | None) -> dict[str, Any]:
    folder = config.run.directory
    log = folder.with_name(f"{folder.name}.log")
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"{system.label}: {config.run.windows} windows, output in {log}", flush=True)
    started = time.monotonic()
    exit_code = run_to_end(command_of(system, overrides_of(system, options)), log)
    seconds = time.monotonic() - started
    if exit_code:
        raise RunError(f"{system.label}: {_last_words(log)} (see {log})")
    held_out_loss, unigram_loss = evaluate(folder, config)
    result = {
        "settings": _fingerprint(config),
        "commit": commit,
        "seconds": seconds,
        "held_out_loss": held_out_loss,
        "unigram_loss": unigram_loss,
    }
    write_text(folder / RESULT, json.dumps(result))
    print(f"{system.label}: {duration(seconds)}, held-out loss {held_out_loss:.3f}", flush=True)
    return result


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
    """Remove an incomplete or different run; RunError for a folder this benchmark did not make."""
    if not folder.exists():
        return
    if not folder.with_name(f"{folder.name}.log").is_file():
        raise RunError(f"{folder}: not a run of this benchmark; name another folder with --work")
    shutil.rmtree(folder)


def _weight_difference(folder: Path, reference: Path) -> float:
    """Largest difference of a weight, key biases apart: their true gradient is zero, so Adam steps
    on noise."""
    from safetensors.torch import load_file

    mine, theirs = (load_file(path / "model.safetensors") for path in (folder, reference))
    names = [name for name in theirs if not name.endswith("key.bias")]
    return max((mine[name] - theirs[name]).abs().max().item() for name in names)


def _text_digest(folder: Path) -> str:
    digest, run = hashlib.sha256(), RunFolder(folder)
    for path in (run.held_out, *_shards(folder), run.tokenizer / "tokenizer.json"):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _shards(folder: Path) -> list[Path]:
    return sorted(RunFolder(folder).clients.glob("*/shard.jsonl"))


def _last_words(log: Path) -> str:
    """The error line of ours in a log, or else its last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    ours = [line.removeprefix("fedbert-ds: ") for line in lines if line.startswith("fedbert-ds: ")]
    return [*(lines or ["it ended without a word"]), *ours][-1]
