"""What is compared, on which run file, and the overrides and the command of each system's run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedbert_ds.compare.plan import SMALL
from fedbert_ds.compare.systems import CENTRALIZED, System, launched, overrides_of, plain
from fedbert_ds.run_file import load_config
from fedbert_ds.telemetry.record import SOURCE

NUM_RANKS = 2
RUN_FILE = SOURCE / "configs" / "wikitext.yaml"
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
TURN = 10
"""Windows in which one client trains before the next one's turn, in `sequential` mode."""
WHOLE_SYSTEMS = (
    CENTRALIZED,
    System("synchronous"),
    System("sequential", TURN),
    *(System(name, ROUND) for name in ("fedavg", "diloco", "muloco")),
)
QUICK_SYSTEMS = (CENTRALIZED, System("synchronous"), System("parallel", 5))
QUICK = ("run.windows=12", *SMALL)
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


def run_file_overrides(system: System, options: ModesOptions) -> tuple[str, ...]:
    """The run file's overrides for one system; the user's come before text, folder and mode."""
    users = (*(() if not options.quick else QUICK_WHOLE if options.whole else QUICK), *options.overrides)
    return (
        *users,
        f"data.source={json.dumps([options.data])}",
        f"run.directory={json.dumps(str(options.work / system.slug))}",
        *overrides_of(system, load_config(RUN_FILE, users)),
    )


def command_of(system: System, overrides: Sequence[str]) -> list[str]:
    """The command of one system's run."""
    if system == CENTRALIZED:
        return plain("centralized", RUN_FILE, overrides)
    return launched(RUN_FILE, overrides, NUM_RANKS)
