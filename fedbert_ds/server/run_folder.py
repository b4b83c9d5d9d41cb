"""A run's folder: the name of every file in it, what makes it fit to start or to resume, which checkpoints count."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from fedbert_ds.atomic_write import write_text
from fedbert_ds.config import RunConfig, dump_config, load_config
from fedbert_ds.errors import RunError
from fedbert_ds.server.body.settings import zero_stage

KEPT_CHECKPOINTS = 2
COMPLETE = "complete.json"
UNCHANGED = (
    "model",
    "cut",
    "tokenizer",
    "data",
    "federation",
    "wire.updates",
    "run.seed",
    "optimizer.name",
    "body.zero_stage",
    "body.precision",
    "clients.expected",
    "clients.local",
)
"""Keys that must be the same when a run resumes."""


@dataclass(frozen=True)
class CheckpointFolder:
    """DeepSpeed's checkpoints, a folder for each window; one counts once it is marked complete."""

    path: Path

    def of(self, window: int) -> Path:
        """The state before `window`."""
        return self.path / f"window-{window}"

    def client_model(self, window: int) -> Path:
        """The reference client model before `window`, and where each client stands in its text."""
        return self.of(window) / "client_model.safetensors"

    def complete_windows(self) -> frozenset[int]:
        """Windows that have a complete checkpoint."""
        return frozenset(int(mark.parent.name.removeprefix("window-")) for mark in self._marks())

    def num_ranks(self) -> int | None:
        """Number of ranks that wrote the complete checkpoints; None when there is none."""
        marks = sorted(self._marks())
        return int(json.loads(marks[-1].read_text(encoding="utf-8"))["ranks"]) if marks else None

    def mark_complete(self, window: int, ranks: int) -> None:
        """Count the checkpoint of `window`, whose parts are all written, and drop all but the newest few."""
        write_text(self.of(window) / COMPLETE, json.dumps({"window": window, "ranks": ranks}))
        for old in sorted(self.complete_windows())[:-KEPT_CHECKPOINTS]:
            # The mark goes first: a checkpoint that is half deleted must not count.
            (self.of(old) / COMPLETE).unlink()
            shutil.rmtree(self.of(old))

    def _marks(self) -> list[Path]:
        return list(self.path.glob(f"window-*/{COMPLETE}"))


@dataclass(frozen=True)
class RunFolder:
    """File names below one folder; `run.directory` of the run file."""

    path: Path

    @property
    def config(self) -> Path:
        """The run file, everything resolved; written first, so a folder without it holds no run."""
        return self.path / "config.yaml"

    @property
    def address(self) -> Path:
        """HOST:PORT of the coordinator, while it takes joins or trains."""
        return self.path / "server.address"

    @property
    def checkpoints(self) -> CheckpointFolder:
        """The states that the run may resume from."""
        return CheckpointFolder(self.path / "checkpoints")

    @property
    def clients(self) -> Path:
        """A folder for each local client: shard, log and state."""
        return self.path / "clients"

    @property
    def tokenizer(self) -> Path:
        """A Hugging Face tokenizer."""
        return self.path / "tokenizer"

    @property
    def held_out(self) -> Path:
        """Articles that no client has, when the server dealt the text."""
        return self.path / "held_out.jsonl"

    @property
    def text_facts(self) -> Path:
        """How the text was dealt."""
        return self.path / "text.json"

    @property
    def metrics(self) -> Path:
        """A line of JSON for each window."""
        return self.path / "metrics.jsonl"

    @property
    def model(self) -> Path:
        """The merged Hugging Face checkpoint."""
        return self.path / "hf"

    @property
    def report(self) -> Path:
        """The page about the run."""
        return self.path / "report.html"

    def shard(self, client: str) -> Path:
        """A local client's articles."""
        return self.clients / client / "shard.jsonl"

    def log(self, client: str) -> Path:
        """What a local client printed."""
        return self.clients / client / "log.txt"

    def trace(self, rank: int) -> Path:
        """A rank's timeline."""
        return self.path / f"trace-{rank}.json"

    def write_config(self, config: RunConfig) -> None:
        """Write the run file, which makes this the folder of a run."""
        write_text(self.config, dump_config(config))

    def remove_if_unused(self) -> None:
        """Leave no folder of a run that failed before it began."""
        if not self.config.exists():
            shutil.rmtree(self.path, ignore_errors=True)

    def reveal_address(self, address: str) -> None:
        """Write the address for scripts that start clients."""
        write_text(self.address, address + "\n")

    def hide_address(self) -> None:
        """Remove the address; a client that starts now waits for the next run's."""
        self.address.unlink(missing_ok=True)


def check_folder(folder: RunFolder, config: RunConfig, resume: bool, world_size: int) -> None:
    """Raise RunError, before anything is written, if the folder does not fit a run that starts or resumes."""
    path = folder.path
    if not resume:
        if path.exists() and any(path.iterdir()):
            raise RunError(f"{path}: holds a run already; add --resume to continue it, or set another run.directory")
        return
    if not folder.config.is_file():
        raise RunError(f"{path}: no run to resume here; drop --resume or set run.directory")
    if not folder.checkpoints.complete_windows():
        raise RunError(f"{path}: this run saved no checkpoint; drop --resume and set another run.directory")
    check_unchanged(load_config(folder.config), config)
    ranks = folder.checkpoints.num_ranks()
    if ranks != world_size:
        raise RunError(f"{path}: was saved by {ranks} ranks, this is {world_size}; start it with {ranks} ranks")


def check_unchanged(saved: RunConfig, now: RunConfig) -> None:
    """Raise RunError naming the first key of UNCHANGED that differs between a saved run and its resumption."""
    before, after = saved.model_dump(), now.model_dump()
    before["body"]["zero_stage"], after["body"]["zero_stage"] = zero_stage(saved.body), zero_stage(now.body)
    for path in UNCHANGED:
        old, new = before, after
        for part in path.split("."):
            old, new = old[part], new[part]
        if old != new:
            raise RunError(
                f"{path} is {new} now and was {old} when {saved.run.directory} was saved; change it back, "
                "or drop --resume and set another run.directory"
            )
