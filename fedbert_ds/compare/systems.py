"""The ways to train that are compared, by the names that users know, and what each sets in a run
file."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedbert_ds.config import FederationSection, RunConfig
from fedbert_ds.errors import ConfigError

DEFAULT_EVERY = {"parallel": 10, "sequential": 10, "fedavg": 20, "diloco": 20, "muloco": 20}
"""Systems that take a number: windows between averages, or of a turn."""
NAMES = ("centralized", "alone", "alone-share", "synchronous", *DEFAULT_EVERY)
PLAIN = ("centralized", "alone", "alone-share")
"""Plain code on one machine: no federation."""
MODE = {"synchronous": "synchronous", "parallel": "parallel", "sequential": "sequential"}
"""Systems with a body at the server, and their `federation.mode`."""
WHOLE = {
    "fedavg": (),
    "diloco": (),
    "muloco": ("optimizer.name=muon", "wire.updates=int2_hadamard"),
}
"""Systems whose clients hold the whole model, and what each sets besides."""
WHOLE_MODE = "parallel"
SERVER_OPTIMIZER = {"diloco": "nesterov", "muloco": "nesterov"}
KEPT = {
    "centralized": ("participants",),
    "synchronous": ("participants", "staleness"),
    "parallel": ("participants", "staleness", "average_scope", "proximal"),
    "sequential": ("average_scope",),
    "fedavg": ("participants", "proximal"),
    "diloco": ("participants", "proximal"),
    "muloco": ("participants", "proximal"),
}
"""Keys of the run file's `federation` that mean something to a system."""
OF_THE_OPTIMIZER = ("server_lr", "server_momentum")
"""Kept, too, where the run file has the same server optimizer."""
NO_BODY = (
    *("body.zero_stage=null", "body.precision=fp32", "body.activation_checkpointing=auto", "body.compile=auto"),
    *("body.fp8=false", "kernels=auto"),
)
"""What a run file says of a body, taken back where there is none."""


@dataclass(frozen=True)
class System:
    """A way to train: a federated mode, a method of whole models, or plain code in one place."""

    name: str
    average_every: int | None = None
    """Windows between averages, or of a turn; None where there are none."""
    staleness: int = 0
    """Windows a client may begin before the exchange of earlier ones is done."""
    server_lr: float | None = None
    """Of a server optimizer; None: the run file's, or the optimizer's default."""

    @property
    def takes_turns(self) -> bool:
        """One client at a time trains, so that no window holds the batches of the others'."""
        return self.name == TURNS

    @property
    def is_federated(self) -> bool:
        """Ranks and clients train it, not plain code."""
        return self.name not in PLAIN

    @property
    def label(self) -> str:
        """For a reader."""
        every = f", average every {self.average_every}" if self.average_every else ""
        rate = "" if self.server_lr is None else f", server_lr {self.server_lr:g}"
        return f"{self.name}{every}{rate}" + (f", staleness {self.staleness}" if self.staleness else "")

    @property
    def slug(self) -> str:
        """For a file name."""
        every = f"-{self.average_every}" if self.average_every else ""
        rate = "" if self.server_lr is None else f"-lr-{self.server_lr:g}"
        return f"{self.name}{every}{rate}" + (f"-stale-{self.staleness}" if self.staleness else "")

    @property
    def typed(self) -> str:
        """As a user types it."""
        every = f":{self.average_every}" if self.average_every else ""
        return f"{self.name}{every}" + ("" if self.server_lr is None else f":{self.server_lr:g}")


TURNS = "sequential"
CENTRALIZED = System("centralized")
ALONE = System("alone")
"""As many tokens for each client as for the whole federation."""
ALONE_SHARE = System("alone-share")
"""The very batches that each client draws in the federation."""
EACH_ALONE = (ALONE, ALONE_SHARE)
"""Systems of a model for each client."""


def parse_systems(texts: Sequence[str], base: RunConfig) -> list[System]:
    """`NAME`, `NAME:N` or `NAME:N:SERVER_LR` each; without N the run file's, if it is of this
    system, or a default.

    ConfigError for an unknown name, a number where none goes, none where one should be, and a
    system that is named twice.
    """
    systems = [_parse(text, base) for text in texts]
    for system in systems:
        if systems.count(system) > 1:
            raise ConfigError(f"--systems {system.typed}: name each once")
    return systems


def overrides_of(system: System, base: RunConfig) -> tuple[str, ...]:
    """What a system changes in a run file that reads as `base`: cut, federation, and what these
    need."""
    federation = {key: getattr(base.federation, key) for key in KEPT.get(system.name, ())}
    if system.name in SERVER_OPTIMIZER:
        if base.federation.server_optimizer == SERVER_OPTIMIZER[system.name]:
            federation |= {key: getattr(base.federation, key) for key in OF_THE_OPTIMIZER}
        federation["server_optimizer"] = SERVER_OPTIMIZER[system.name]
        if system.server_lr is not None:
            federation["server_lr"] = system.server_lr
    if system.name in WHOLE:
        federation["mode"] = WHOLE_MODE
    elif system.name in MODE:
        federation["mode"] = MODE[system.name]
    if system.average_every:
        federation["average_every"] = system.average_every
    if federation.get("average_scope", _default("average_scope")) != _default("average_scope"):
        federation["personal_parts"] = "averaged"  # what is compared are whole models
    if system.staleness:
        federation["staleness"] = system.staleness
    section = json.dumps({key: value for key, value in federation.items() if value != _default(key)})
    cut = ("cut=embeddings",) if base.cut == "whole" else ()
    if system.name in WHOLE:
        return ("cut=whole", *NO_BODY, *WHOLE[system.name], f"federation={section}")
    return (*cut, f"federation={section}")


def launched(run_file: Path, overrides: Sequence[str], ranks: int) -> list[str]:
    """The command of a federated run: the launcher with its ranks and client processes."""
    # The rendezvous stays on the loopback: a machine's own host name does not always resolve.
    started = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={ranks}"]
    program = ["--module", "fedbert_ds.server.pretrain", "--config", str(run_file)]
    return [sys.executable, "-m", "torch.distributed.run", *started, *program, *overrides]


def plain(module: str, run_file: Path, overrides: Sequence[str], *options: str) -> list[str]:
    """The command of a program of this package that trains without a federation."""
    return [sys.executable, "-m", f"fedbert_ds.compare.{module}", "--config", str(run_file), *options, *overrides]


def _parse(text: str, base: RunConfig) -> System:
    name, separator, numbers = text.partition(":")
    number, with_rate, rate = numbers.partition(":")
    if "=" in text:
        raise ConfigError(f"--systems {text}: section.key=value goes right behind RUN_FILE; move it there")
    if name not in NAMES:
        raise ConfigError(f"--systems {text}: choose {', '.join(NAMES)}")
    if name not in DEFAULT_EVERY:
        if separator:
            raise ConfigError(f"--systems {text}: {name} takes no number; drop :{numbers}")
        return System(name)
    if not separator:
        return System(name, _own_period(name, base) or DEFAULT_EVERY[name])
    if not number.isdecimal() or not int(number):
        raise ConfigError(f"--systems {text}: give {name} a number of windows, {name}:{DEFAULT_EVERY[name]} say")
    if not with_rate:
        return System(name, int(number))
    if name not in SERVER_OPTIMIZER:
        raise ConfigError(f"--systems {text}: {name} has no server optimizer; drop :{rate}")
    return System(name, int(number), server_lr=_rate(text, rate))


def _rate(text: str, rate: str) -> float:
    try:
        value = float(rate)
    except ValueError:
        value = 0.0
    if not 0.0 < value < math.inf:
        raise ConfigError(f"--systems {text}: a server_lr is a number above 0; write one, or drop it")
    return value


def _own_period(name: str, base: RunConfig) -> int | None:
    """The run file's period, where it is a run file of this system."""
    federation = base.federation
    if name in WHOLE:
        is_own = base.cut == "whole" and federation.server_optimizer == SERVER_OPTIMIZER.get(name, "none")
        is_own &= (name == MULOCO) == (base.optimizer.name == "muon")
    else:
        is_own = base.cut != "whole" and federation.mode == MODE[name]
    return federation.average_every if is_own and federation.average_every > 1 else None


MULOCO = "muloco"


def _default(key: str) -> object:
    return FederationSection.model_fields[key].default
