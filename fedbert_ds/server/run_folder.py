"""A run's folder: its file names, and the checks before a start or resume."""

from __future__ import annotations

import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedbert_ds.atomic_write import write_text
from fedbert_ds.config import RunConfig
from fedbert_ds.errors import RunError
from fedbert_ds.folder_lock import check_usable, holds_nothing, private_folder
from fedbert_ds.run_file import dump_config, load_config
from fedbert_ds.server.checkpoint_folder import CheckpointFolder

TRACKERS = "trackers"
"""Folder in a run's folder: files of `run.trackers`."""
UNCHANGED = (
    "model",
    "cut",
    "task",
    "tokenizer",
    "data",
    "federation",
    "wire.updates",
    "run.seed",
    "optimizer.name",
    "body.precision",
    "clients.expected",
    "clients.local",
)
"""Keys that a resumed run must not change."""


@dataclass(frozen=True)
class RunFolder:
    """The file names below `run.directory`."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved run file. Written first: a folder without it holds no run."""
        return self.path / "config.yaml"

    @property
    def run_id(self) -> Path:
        """The run's id, which tells it from any other run."""
        return self.path / "run.txt"

    @property
    def address(self) -> Path:
        """Tells clients where the coordinator is while it takes joins or trains, or that the run is
        complete."""
        return self.path / "server.address"

    @property
    def checkpoints(self) -> CheckpointFolder:
        """The checkpoints that the run may resume from."""
        return CheckpointFolder(self.path / "checkpoints")

    @property
    def clients(self) -> Path:
        """One folder for each local client: shard, log and, where it has one, its state."""
        return self.path / "clients"

    @property
    def tokenizer(self) -> Path:
        """A Hugging Face tokenizer."""
        return self.path / "tokenizer"

    @property
    def held_out(self) -> Path:
        """Articles that no client has, if the server dealt the text."""
        return self.path / "held_out.jsonl"

    @property
    def text_facts(self) -> Path:
        """JSON of the `TextFacts`, or null where the server deals no text. Written last: text and
        tokenizer are complete once it is there."""
        return self.path / "text.json"

    @property
    def metrics(self) -> Path:
        """One line of JSON for each window."""
        return self.path / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        """One line of JSON for each evaluation."""
        return self.path / "evaluations.jsonl"

    @property
    def best_model(self) -> Path:
        """The merged Hugging Face checkpoint of the lowest held-out loss, with `run.keep_best`; its
        `evaluation.json` is that evaluation."""
        return self.path / "hf-best"

    @property
    def model(self) -> Path:
        """The merged Hugging Face checkpoint."""
        return self.path / "hf"

    @property
    def body(self) -> Path:
        """The body and its tokenizer, where another party has the client model."""
        return self.path / "body"

    @property
    def report(self) -> Path:
        """The run's report."""
        return self.path / "report.html"

    def shard(self, client: str) -> Path:
        """A local client's articles."""
        return self.clients / client / "shard.jsonl"

    def log(self, client: str) -> Path:
        """A local client's output."""
        return self.clients / client / "log.txt"

    def trace(self, rank: int) -> Path:
        """A rank's timeline, for Perfetto."""
        return self.path / f"trace-{rank}.json"

    def write_config(self, config: RunConfig) -> None:
        """Write the run file. From then on the folder holds a run."""
        private_folder(self.path)
        write_text(self.config, dump_config(config))

    def identify(self) -> str:
        """The run's id; drawn at random, 32 hexadecimal digits, where it has none yet."""
        if not self.run_id.is_file():
            write_text(self.run_id, secrets.token_hex(16) + "\n")
        return self.run_id.read_text(encoding="utf-8").strip()

    def remove(self) -> None:
        """Delete the folder of a run that failed before it began."""
        shutil.rmtree(self.path, ignore_errors=True)


def check_folder(folder: RunFolder, config: RunConfig, resume: bool) -> None:
    """Check, before anything is written, that the folder fits a run that starts or resumes.

    A run that saved nothing begins again with the text in its folder; ranks and ZeRO stage may
    change. Raises RunError if the run does not fit.
    """
    path = folder.path
    check_usable(path, "run.directory")
    if not resume:
        if not holds_nothing(path):
            raise RunError(f"{path}: holds a run already; add --resume to continue it, or set another run.directory")
        return
    if not folder.config.is_file():
        raise RunError(f"{path}: no run to resume here; drop --resume or set run.directory")
    last = max(folder.checkpoints.complete_windows(), default=0)
    if last > config.run.windows:
        raise RunError(f"{path}: is saved up to window {last}, run.windows is {config.run.windows}; raise it")
    check_unchanged(load_config(folder.config), config)


def check_unchanged(saved: RunConfig, now: RunConfig) -> None:
    """Compare a saved run with its resumption. Raises RunError for the first changed key."""
    before, after = saved.model_dump(), now.model_dump()
    if (saved.aggregator is None) != (now.aggregator is None):
        raise RunError(
            f"aggregator: {saved.run.directory} was saved {'without' if saved.aggregator is None else 'with'} this "
            "section, and the client model is where it was then; change it back, or drop --resume"
        )
    for path in UNCHANGED:
        old, new = before, after
        for part in path.split("."):
            old, new = old[part], new[part]
        if old != new:
            key, sentence = _difference(path, old, new)
            raise RunError(
                f"{key} {sentence} when {saved.run.directory} was saved; change it back, or drop --resume and set "
                "another run.directory"
            )


def _difference(path: str, old: Any, new: Any) -> tuple[str, str]:
    """(the first key at or below `path` that differs, how: "is ... now and was ...")."""
    if isinstance(old, dict) and isinstance(new, dict):
        part = next(part for part in old | new if old.get(part) != new.get(part))
        return _difference(f"{path}.{part}", old.get(part), new.get(part))
    if isinstance(old, tuple) and isinstance(new, tuple):
        added = [str(one) for one in new if one not in old]
        gone = [str(one) for one in old if one not in new]
        if added or gone:
            changes = [f"has {', '.join(added)} now"] * bool(added) + [f"has not {', '.join(gone)} now"] * bool(gone)
            return path, f"{' and '.join(changes)}, unlike"
    return path, f"is {new} now and was {old}"
