"""The ways to train that are compared, and the run file's overrides and the command of each."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedbert_ds.telemetry.record import SOURCE

NUM_RANKS = 2
LAUNCHER = SOURCE / "launchers" / "pretrain.py"
RUN_FILE = SOURCE / "configs" / "wikitext.yaml"


@dataclass(frozen=True)
class System:
    """A way to train: a federated mode, a method of whole models, or centralized."""

    name: str
    average_every: int | None = None
    """Windows between averages; None where weights are not averaged."""
    staleness: int = 0
    """Windows a client may begin before the exchange of earlier ones is done."""

    @property
    def takes_turns(self) -> bool:
        """One client at a time trains, so that no window holds the batches of the others'."""
        return self.name == "sequential"

    @property
    def label(self) -> str:
        """For a reader."""
        every = f", average every {self.average_every}" if self.average_every else ""
        return f"{self.name}{every}" + (f", staleness {self.staleness}" if self.staleness else "")

    @property
    def slug(self) -> str:
        """For a file name."""
        every = f"-{self.average_every}" if self.average_every else ""
        return f"{self.name}{every}" + (f"-stale-{self.staleness}" if self.staleness else "")


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
ROUND = 20
"""Local steps between two exchanges of whole models."""
WHOLE_MODEL = {
    "whole-fedavg": (),
    "whole-diloco": ("federation.server_optimizer=nesterov",),
    "whole-muloco": (
        "federation.server_optimizer=nesterov",
        "optimizer.name=muon",
        "wire.updates=int2_hadamard",
    ),
}
"""Methods of clients that hold the whole model, and what each sets beside the cut."""
TURN = 10
"""Windows in which one client trains before the next one's turn, in `sequential` mode."""
WHOLE_SYSTEMS = (
    CENTRALIZED,
    System("synchronous"),
    System("sequential", TURN),
    *(System(name, ROUND) for name in WHOLE_MODEL),
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
QUICK_WHOLE = (*QUICK, f"run.windows={ROUND}")
"""The same for whole models: a round has to end."""


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
    whole: bool = False
    """Compare a body at the server with clients that hold the whole model."""
    learning_rates: tuple[float, ...] = ()
    """Each system's own is the best of these; none: the run file's for all."""
    tuning_windows: int | None = None
    """Windows of each run that tries a learning rate; None: as many as are compared."""
    overrides: tuple[str, ...] = ()
    """`section.key=value`, for every system alike."""

    @property
    def systems(self) -> tuple[System, ...]:
        """What is compared; centralized comes first."""
        if self.whole:
            return WHOLE_SYSTEMS
        return QUICK_SYSTEMS if self.quick else STALE_SYSTEMS if self.staleness else SYSTEMS


def overrides_of(system: System, options: ModesOptions) -> tuple[str, ...]:
    """The run file's overrides for one system; the user's come before text, folder and mode."""
    mode: tuple[str, ...] = () if system == CENTRALIZED else (f"federation.mode={system.name}",)
    if system.name in WHOLE_MODEL:
        mode = ("cut=whole", "federation.mode=parallel", *WHOLE_MODEL[system.name])
    every = (f"federation.average_every={system.average_every}",) if system.average_every else ()
    stale = (f"federation.staleness={system.staleness}",) if system.staleness else ()
    return (
        *(() if not options.quick else QUICK_WHOLE if options.whole else QUICK),
        *options.overrides,
        f"data.source={json.dumps([options.data])}",
        f"run.directory={json.dumps(str(options.work / system.slug))}",
        *mode,
        *every,
        *stale,
    )


def command_of(system: System, overrides: Sequence[str]) -> list[str]:
    """The command of one system's run, in the repository's root."""
    run_file = ["--config", str(RUN_FILE), *overrides]
    if system == CENTRALIZED:
        return [sys.executable, "-m", "benchmarks.modes.centralized", *run_file]
    # The rendezvous stays on the loopback: a machine's own host name does not always resolve.
    ranks = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={NUM_RANKS}"]
    return [sys.executable, "-m", "torch.distributed.run", *ranks, str(LAUNCHER), *run_file]
