"""Runs that are made once: one that is complete with the same settings is read, not repeated, and
an interrupted one goes on where it was saved."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedbert_ds.atomic_write import write_text
from fedbert_ds.bench.process import end, environment
from fedbert_ds.compare.attempts import Attempts, begin, begun, forget, log_of
from fedbert_ds.config import RunConfig
from fedbert_ds.errors import RunError
from fedbert_ds.server.run_folder import RunFolder
from fedbert_ds.telemetry.progress import duration

RESULT = "result.json"
"""Written into a run's folder last, so its presence says that the run is complete."""
LONGEST_SECONDS = 24 * 3600.0
"""A run that takes longer hangs."""

Measure = Callable[[], Mapping[str, Any]]


@dataclass(frozen=True)
class Job:
    """A run to make."""

    label: str
    """For a reader."""
    config: RunConfig
    """As the command has it; the run writes its `run.directory`."""
    command: Sequence[str]
    made_with: Sequence[str] = ()
    """What decides the result besides the run file, such as options of the command."""
    device: str = "cpu"
    """`cpu`: its processes see no GPU. `cuda`: they take those of the machine."""
    resumes: bool = False
    """With `--resume` the command goes on where it was saved; else the run begins anew."""

    @property
    def folder(self) -> RunFolder:
        """Where it writes."""
        return RunFolder(self.config.run.directory)

    @property
    def fingerprint(self) -> str:
        """Of everything the run file says, of what the DeepSpeed file holds, and of `made_with`."""
        # Without defaults: a key that a later version adds makes no run another one.
        places: Any = {"run": {"directory"}, "body": {"deepspeed"}}
        digest = hashlib.sha256(self.config.model_dump_json(exclude_defaults=True, exclude=places).encode())
        deepspeed = self.config.body.deepspeed
        if deepspeed is not None and deepspeed.is_file():
            digest.update(deepspeed.read_bytes())
        for text in self.made_with:
            digest.update(b"\0" + text.encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class ClientCosts:
    """What the run asks of a client, the largest of all clients."""

    flops_per_token: float
    """Floating-point operations, forward and backward."""
    peak_memory_mb: int
    """Of the process, Python and torch included."""


def finished(job: Job, commit: str | None, measure: Measure, replaces: bool = False) -> dict[str, Any]:
    """The run's result: read if complete with these settings, else made and measured.

    It has what `measure` says of the finished run, `seconds` from the start of its processes to the
    end of the last, of all attempts, and the `commit` that made it. A complete run of other
    settings is replaced, or RunError. RunError for a run that fails, too, with its log.
    """
    folder = job.folder.path
    path = folder / RESULT
    if path.is_file():
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if result["settings"] == job.fingerprint:
            print(f"{job.label}: complete already", flush=True)
            return result
        if not replaces:
            raise RunError(f"{folder}: is complete, made with other settings; name another --out, or remove it")
    before = begun(folder) if job.resumes and job.folder.config.is_file() else None
    if before is None or before.settings != job.fingerprint:
        _clear(folder)
        before = None
    return _make(job, before, commit, measure)


def client_costs(logs: Sequence[Path]) -> ClientCosts | None:
    """The largest of what clients printed into these logs at their end; None if none did."""
    lines = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in logs)
    found = re.findall(r"peak memory (\d+) MB, ([\d.]+) MFLOP per token", lines)
    if not found:
        return None
    return ClientCosts(max(float(flops) for _, flops in found) * 1e6, max(int(memory) for memory, _ in found))


def run_to_end(command: Sequence[str], log: Path, device: str = "cpu") -> int:
    """Run a command to its end and return its exit code; it ends before this process does. What it
    prints is added to the log.
    """
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # One thread each, so that on the CPU the numbers are the same on every machine.
            env=environment(device),
            # Ctrl-C comes to this process alone, which then ends the run in order.
            start_new_session=True,
        )
    try:
        return process.wait(timeout=LONGEST_SECONDS)
    except subprocess.TimeoutExpired:
        raise RunError(f"a run took more than {LONGEST_SECONDS / 3600:.0f} hours (see {log})") from None
    finally:
        end(process, patience=90)


def check_same_text(folders: Sequence[Path]) -> None:
    """RunError unless all runs have the same shards, held-out text and word pieces."""
    first, *others = [(folder, text_digest(folder)) for folder in folders]
    for folder, digest in others:
        if digest != first[1]:
            raise RunError(f"{folder}: not the shards and word pieces of {first[0]}; remove both and run again")


def text_facts(folder: Path) -> dict[str, Any]:
    """How the text was dealt, and a digest of it, for a reader who has the same text."""
    facts = json.loads(RunFolder(folder).text_facts.read_text(encoding="utf-8"))
    names = ("articles", "held_out", "shard_articles", "shard_characters")
    return {name: facts[name] for name in names} | {"sha256": text_digest(folder)}


def text_digest(folder: Path) -> str:
    """Of a run's shards, held-out text and word pieces."""
    digest, run = hashlib.sha256(), RunFolder(folder)
    for path in (run.held_out, *sorted(run.clients.glob("*/shard.jsonl")), run.tokenizer / "tokenizer.json"):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def public_settings(config: RunConfig) -> dict[str, Any]:
    """A run's resolved settings for the record, with no path of this machine in them."""
    tree: dict[str, Any] = json.loads(config.model_dump_json())
    del tree["run"]["directory"], tree["federation"]
    if config.body.deepspeed is not None:
        tree["body"]["deepspeed"] = config.body.deepspeed.name
    tree["data"]["source"] = [_name(source) for source in config.data.source]
    for section, key in (("tokenizer", "path"), ("model", "checkpoint")):
        if tree[section][key] is not None:
            tree[section][key] = _name(tree[section][key])
    return tree


def _name(source: str) -> str:
    """A file or folder without the way to it; the hub's names as they are."""
    return Path(source).name if Path(source).exists() else source


def _make(job: Job, before: Attempts | None, commit: str | None, measure: Measure) -> dict[str, Any]:
    """`before` are the attempts that this one goes on with; None if the run is a new one."""
    folder = job.folder.path
    log = log_of(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    saved, windows = max(job.folder.checkpoints.complete_windows(), default=0), job.config.run.windows
    tells = f"{windows} windows" if before is None else f"goes on at window {saved} of {windows}"
    print(f"{job.label}: {tells}, output in {log}", flush=True)
    attempts = (before or Attempts(job.fingerprint)).and_one_by(commit)
    begin(folder, attempts)
    said_before = log.stat().st_size if log.is_file() else 0
    started = time.monotonic()
    exit_code = run_to_end([*job.command, *(["--resume"] if before is not None else [])], log, job.device)
    seconds = attempts.seconds + time.monotonic() - started
    if exit_code:
        last_words = _last_words(log, said_before)
        raise RunError(f"{job.label}: {last_words} (see {log})")
    result = {"settings": job.fingerprint, "commit": attempts.commit, "seconds": seconds, **measure()}
    write_text(folder / RESULT, json.dumps(result))
    print(f"{job.label}: {duration(seconds)}, held-out loss {result['held_out_loss']:.3f}", flush=True)
    return result


def _clear(folder: Path) -> None:
    """Remove an incomplete or different run; RunError for a folder that is none of these runs."""
    if folder.exists():
        if not log_of(folder).is_file():
            raise RunError(f"{folder}: not a run of this comparison; name another folder")
        shutil.rmtree(folder)
    forget(folder)


def _last_words(log: Path, start: int) -> str:
    """The error line of ours in a log from this byte on, or else its last line."""
    said = log.read_bytes()[start:].decode(errors="replace")
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    ours = [line.removeprefix("fedbert-ds: ") for line in lines if line.startswith("fedbert-ds: ")]
    return [*(lines or ["it ended without a word"]), *ours][-1]
