"""What a comparison trains: a run for each system and seed, all checked before the first begins."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fedbert_ds.compare.runs import Job, public_settings
from fedbert_ds.compare.systems import (
    ALONE_SHARE,
    CENTRALIZED,
    EACH_ALONE,
    NAMES,
    System,
    launched,
    overrides_of,
    parse_systems,
    plain,
)
from fedbert_ds.compare.tasks import TaskOptions
from fedbert_ds.config import RunConfig
from fedbert_ds.errors import ConfigError
from fedbert_ds.run_file import load_config
from fedbert_ds.server.local_clients import client_name
from fedbert_ds.server.run_folder import RunFolder

QUICK_SYSTEMS = ("centralized", "alone", "synchronous", "diloco:4")
SMALL = (
    "tokenizer.vocab_size=500",
    "data.max_articles=12",
    "window.tokens=1024",
    "window.tokens_per_micro_batch=512",
    "optimizer.warmup_windows=2",
    "clients.expected=2",
    "clients.local=2",
)
"""What makes a run file a matter of a minute: it shows that everything works, and nothing else."""
QUICK = ("run.windows=8", "run.evaluate_tokens=2048", *SMALL)
TRAINS_ALL_WINDOWS = (
    *("run.evaluate_every=null", "run.early_stopping_patience=null", "run.keep_best=false", "run.trace=false"),
    "server.port=0",
)
"""For every system: the same number of windows, and no port that another run may have."""


@dataclass(frozen=True)
class CompareOptions:
    """What a user gives the command."""

    run_file: Path
    out: Path
    """Folder for runs, table, record and picture."""
    command: str
    """What the user typed, for the record."""
    systems: tuple[str, ...] = ()
    """`NAME` or `NAME:N`; none: all."""
    seeds: tuple[int, ...] = ()
    """None: the run file's."""
    ranks: int = 1
    """Of a federated run."""
    device: str = "cpu"
    """Of ranks, plain code and evaluations; clients are where the run file has them."""
    evaluations: int = 20
    """Of each client alone, on its held-out text."""
    patience: int | None = None
    """A client alone ends after so many of these without a lower loss."""
    glue: Path | None = None
    """GLUE's original files, for `tasks`."""
    tasks: tuple[str, ...] = ()
    glue_seeds: tuple[int, ...] = (0, 1, 2)
    glue_epochs: int | None = None
    glue_learning_rate: float | None = None
    quick: bool = False
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Every run of a comparison. `Plan.of` checks it."""

    options: CompareOptions
    base: RunConfig
    """The run file with the user's overrides."""
    systems: tuple[System, ...]
    seeds: tuple[int, ...]
    tasks: TaskOptions | None
    """What the models are fine-tuned on."""

    @classmethod
    def of(cls, options: CompareOptions) -> Plan:
        """ConfigError, one line, for anything that would fail later for what was typed."""
        if options.ranks < 1:
            raise ConfigError(f"--ranks {options.ranks}: must be 1 or more")
        if options.evaluations < 1:
            raise ConfigError(f"--evaluations {options.evaluations}: must be 1 or more")
        if options.patience is not None and options.patience < 1:
            raise ConfigError(f"--patience {options.patience}: must be 1 or more")
        _check_device(options.device)
        base = load_config(options.run_file, _users(options))
        _check_run_file(options.run_file, base)
        tasks = TaskOptions.of(
            options.glue,
            options.tasks,
            options.glue_seeds,
            options.glue_epochs,
            options.glue_learning_rate,
            options.quick,
        )
        names = options.systems or (QUICK_SYSTEMS if options.quick else NAMES)
        plan = cls(options, base, tuple(parse_systems(names, base)), options.seeds or (base.run.seed,), tasks)
        _check_seeds(plan.seeds)
        for system in plan.systems:
            try:
                plan.jobs(system, plan.seeds[0])
            except ConfigError as error:
                raise ConfigError(f"--systems {system.typed}: {error}") from error
        if tasks is not None:
            tasks.check()
        return plan

    @cached_property
    def clients(self) -> tuple[str, ...]:
        """Names of the local clients."""
        return tuple(client_name(number) for number in range(self.base.clients.local))

    @cached_property
    def owners(self) -> dict[str, str]:
        """Each client as the table calls it: by its source, where it has one of its own."""
        names = [Path(source).stem for source in self.base.data.source]
        if self.base.data.shards != "source" or len(set(names)) != len(names):
            names = list(self.clients)
        return dict(zip(self.clients, names, strict=True))

    def text(self, seed: int) -> RunFolder:
        """Shards and vocabulary of a seed, the same for every system."""
        return RunFolder(self.options.out / f"seed-{seed}" / "text")

    def text_config(self, seed: int) -> RunConfig:
        """The run file that the text is prepared from."""
        return self._load(CENTRALIZED, seed, self.text(seed).path, has_text=False)[1]

    def jobs(self, system: System, seed: int) -> dict[str, Job]:
        """The runs of a system: one, under the name "", or one for each client alone."""
        folder = self.options.out / f"seed-{seed}" / system.slug
        label = f"seed {seed}, {system.label}" if len(self.seeds) > 1 else system.label
        if system not in EACH_ALONE:
            return {"": self._job(system, seed, folder, label)}
        return {
            client: self._job(system, seed, folder / self.owners[client], f"{label}, {self.owners[client]}", client)
            for client in self.clients
        }

    @property
    def settings(self) -> dict[str, Any]:
        """What must not change while a comparison goes on, without paths of this machine."""
        tree = public_settings(self.base) | {"federation": self.base.federation.model_dump(mode="json")}
        del tree["run"]["seed"]
        if self.options.device != "cpu":
            tree["device"] = self.options.device
        return tree | {"ranks": self.options.ranks, "evaluations": self.options.evaluations,
                       "patience": self.options.patience}  # fmt: skip

    def _job(self, system: System, seed: int, folder: Path, label: str, client: str = "") -> Job:
        run_file, text = self.options.run_file, self.text(seed).path
        overrides, config = self._load(system, seed, folder)
        device = self.options.device
        on = [] if device == "cpu" else ["--device", device]
        if system.is_federated:
            ranks = self.options.ranks
            return Job(label, config, launched(run_file, overrides, ranks), [str(ranks), *on], device, resumes=True)
        if not client:
            command = plain("centralized", run_file, overrides, "--text", str(text), *on)
            return Job(label, config, command, on, device)
        every = max(1, config.run.windows // self.options.evaluations)
        given = ["--client", client, "--every", str(every), *on]
        if self.options.patience is not None:
            given += ["--patience", str(self.options.patience)]
        if system == ALONE_SHARE:
            given.append("--share")
        return Job(label, config, plain("alone", run_file, overrides, "--text", str(text), *given), given, device)

    def _load(
        self, system: System, seed: int, folder: Path, has_text: bool = True
    ) -> tuple[tuple[str, ...], RunConfig]:
        """(overrides, the run file with them)."""
        vocabulary: tuple[str, ...] = ()
        if has_text and self.base.tokenizer.path is None and self.base.model.checkpoint is None:
            vocabulary = (f"tokenizer.path={json.dumps(str(self.text(seed).tokenizer))}",)
        overrides = (
            *_users(self.options),
            *overrides_of(system, self.base),
            *TRAINS_ALL_WINDOWS,
            f"run.seed={seed}",
            f"run.directory={json.dumps(str(folder))}",
            *vocabulary,
        )
        return overrides, load_config(self.options.run_file, overrides)


def _users(options: CompareOptions) -> tuple[str, ...]:
    """The user's overrides, and those of --quick."""
    if not options.quick:
        return options.overrides
    given = load_config(options.run_file, options.overrides)
    two = (f"data.source={json.dumps(list(given.data.source[:2]))}",) if given.data.shards == "source" else ()
    return (*QUICK, *options.overrides, *two)


def _check_device(device: str) -> None:
    if device == "cpu":
        return
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("--device cuda: this machine has no GPU that torch can use; drop it")


def _check_run_file(path: Path, base: RunConfig) -> None:
    if not base.clients.local:
        raise ConfigError(f"{path}: clients.local is 0; compare starts all clients here, so give it some")
    if base.clients.local != base.clients.expected:
        raise ConfigError(
            f"{path}: clients.local {base.clients.local} is not clients.expected {base.clients.expected}; compare "
            "starts all clients here, so make them equal"
        )
    if base.task.is_labelled:
        raise ConfigError(
            f"{path}: task.name {base.task.name}: compare trains masked words; remove the section task, and fine-tune "
            "what was trained with --glue"
        )
    if base.aggregator is not None:
        raise ConfigError(f"{path}: aggregator: compare starts no aggregator of another party; remove the section")
    if not base.data.client_held_out:
        raise ConfigError(
            f"{path}: data.client_held_out is 0, which leaves no text of clients to compare on; set 0.05 say"
        )


def _check_seeds(seeds: Sequence[int]) -> None:
    if len(set(seeds)) != len(seeds):
        raise ConfigError(f"--seeds {' '.join(map(str, seeds))}: name each once")
