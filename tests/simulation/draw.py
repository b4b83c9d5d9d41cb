"""What a seed draws: a federation's form, and the faults that befall it."""

from __future__ import annotations

import ast
import random
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fedbert_ds.config import RunConfig
from fedbert_ds.run_file import parse_config

Kind = Literal["kill client", "hang", "cut", "kill ranks", "stop", "damage"]
NAMES = ("ada", "bo", "cy", "di", "ed", "flo")
SILENCE_SECONDS = 60.0
RECONNECT_SECONDS = 6.0


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong, after so many seconds or operations of the ranks."""

    kind: Kind
    who: str = ""
    seconds: float = 0.0
    work: int | None = None
    duration: float | None = 0.0
    """Seconds until it is over; None: never."""
    notice: float = 0.0
    """Seconds until the server notices a lost connection."""
    keeps_state: bool = True


@dataclass(frozen=True)
class Schedule:
    """A seed's run."""

    seed: int
    config: RunConfig
    mode: str
    ranks: tuple[int, ...]
    """How many, at each start of the run; the last number holds for all later ones."""
    clients: tuple[str, ...]
    num_first: int
    """So many clients are there at the start; the others join later."""
    newcomers_after: float
    characters: dict[str, int]
    latency: float
    """Seconds of most messages, at most."""
    lockstep_forwards: bool
    faults: tuple[Fault, ...] = field(default=())

    @property
    def waits(self) -> bool:
        """The run waits for whoever is lost."""
        return self.config.clients.on_loss == "wait"

    def __str__(self) -> str:
        clients = self.config.clients
        return (
            f"seed {self.seed}: {self.mode}, on_loss {clients.on_loss}, {self.ranks} ranks, "
            f"{self.num_first} of {len(self.clients)} clients at first, {self.config.run.windows} windows, "
            f"save_every {self.config.run.save_every}, {self.config.federation.participants} take part, "
            f"staleness {self.config.federation.staleness}; " + "; ".join(map(str, self.faults))
        )


def draw(seed: int) -> Schedule:
    """The schedule of a seed."""
    rng = random.Random(seed)
    mode = rng.choices(("synchronous", "parallel", "sequential", "whole"), (55, 20, 12, 13))[0]
    waits = rng.random() < 0.65
    num_first = rng.choice((1, 2, 2, 2, 3, 3, 4))
    average_every = 1 if mode == "synchronous" else rng.choice((1, 2))
    windows = rng.choice((1, 2, 2, 3, 4)) if waits else rng.choice((2, 3, 4))
    if mode in ("sequential", "whole"):
        windows = max(1, windows // average_every) * average_every
    num_late = rng.choice((0, 0, 0, 1, 2)) if num_first < 4 else 0
    participants: Any = "all"
    if mode != "sequential" and num_first > 1 and rng.random() < 0.2:
        participants = rng.randint(1, num_first - 1)
    staleness = 0
    if not waits and mode in ("synchronous", "parallel") and participants == "all":
        staleness = rng.choice((0, 0, 1, 2))
    tree = {
        "run": {"windows": windows, "save_every": rng.choice((1, 2, 3)), "seed": seed % 7},
        "data": {"sequence_length": 8},
        "window": {
            "tokens": num_first * rng.choice((8, 8, 14)),
            "tokens_per_micro_batch": rng.choice((8, 12, 16)),
            "micro_batches_in_flight": rng.choice((1, 2, 3, "auto")),
            "order": rng.choice(("fixed", "arrival")),
            "clients_per_micro_batch": rng.choice((1, 1, 2)),
        },
        "federation": {
            "mode": "parallel" if mode == "whole" else mode,
            "participants": participants,
            "staleness": staleness,
            "bound": None,
            **({} if mode == "synchronous" else {"average_every": average_every}),
        },
        "clients": {
            "expected": num_first,
            "minimum": None if waits else rng.randint(1, num_first),
            "maximum": num_first + num_late,
            "on_loss": "wait" if waits else "continue",
        },
        "cut": "whole" if mode == "whole" else "embeddings",
        "wire": {"compression": "none"},
    }
    config = _config(repr(tree))
    clients = NAMES[: num_first + num_late]
    ranks = tuple(rng.choices((1, 2, 3), (65, 28, 7))[0] for _ in range(2))
    ranks = ranks if rng.random() < 0.2 else ranks[:1]
    length = 8.0 * windows
    faults = [_fault(rng, clients, length) for _ in range(rng.choice((0, 1, 1, 2, 2, 3)))]
    if (config.clients.minimum or num_first) < num_first and len(faults) == 1 and rng.random() < 0.5:
        faults = [replace(fault, duration=None) if fault.kind == "kill client" else fault for fault in faults]
    return Schedule(
        seed,
        config,
        mode,
        ranks,
        clients,
        num_first,
        newcomers_after=rng.uniform(0, length),
        characters={client: rng.choice((1000, 1000, 2000, 3500)) for client in clients},
        latency=rng.choice((0.2, 0.5, 1.0)),
        lockstep_forwards=rng.random() < 0.25,
        faults=tuple(faults),
    )


def _fault(rng: random.Random, clients: tuple[str, ...], length: float) -> Fault:
    kinds: tuple[Kind, ...] = ("kill client", "hang", "cut", "kill ranks", "stop", "damage")
    kind = rng.choices(kinds, (40, 15, 20, 15, 5, 5))[0]
    who, seconds = rng.choice(clients), rng.uniform(0, length)
    notice = rng.choice((0.0, 0.0, 1.0, 20.0))
    match kind:
        case "kill client":
            back = rng.choice((0.1, 1.0, 5.0, 15.0))
            return Fault(kind, who, seconds, duration=back, notice=notice, keeps_state=rng.random() < 0.7)
        case "hang":
            return Fault(kind, who, seconds, duration=rng.choice((3.0, 33.0, SILENCE_SECONDS + 15)))
        case "cut":
            return Fault(kind, who, seconds, duration=rng.choice((0.1, 2.0, 2 * RECONNECT_SECONDS)), notice=notice)
        case "kill ranks" if rng.random() < 0.6:
            return Fault(kind, work=rng.randint(1, int(40 * length)))
        case _:
            return Fault(kind, seconds=seconds)


def _config(text: str) -> RunConfig:
    tree = ast.literal_eval(text)
    tree["optimizer"] = {
        "name": "sgd", "lr": 1.0, "schedule": "constant", "weight_decay": 0.0, "gradient_clipping": 0.0
    }  # fmt: skip
    tree["clients"] |= {
        "local": 0, "join_timeout": 400.0, "silence_timeout": SILENCE_SECONDS, "reconnect_timeout": RECONNECT_SECONDS
    }  # fmt: skip
    return parse_config(tree, "a schedule")
