"""What `bench pipeline` runs, in which order: systems, links and overrides of its run file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedbert_ds.config import RunConfig
from fedbert_ds.run_file import load_config

RUN_FILE = Path(__file__).with_name("run.yaml")
OURS, CENTRALIZED = "ours", "centralized"
VARIANTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("", ()),
    ("fp32 embeddings", ("cut=embeddings", "wire.activations=fp32", "wire.gradients=fp32")),
    ("synchronous", ("federation.mode=synchronous", "wire.updates=int8")),
    ("synchronous, staleness 1", ("federation.mode=synchronous", "wire.updates=int8", "federation.staleness=1")),
)
"""Of ours: rare averages with rows at int8; an expensive wire; client updates every window."""
BODY_ALONE = "body alone"
"""Variant of centralized: no embeddings, no head; activations and gradients are at hand."""
QUICK = (
    "run.windows=6",
    "model.num_hidden_layers=2",
    "model.hidden_size=128",
    "model.num_attention_heads=2",
    "tokenizer.vocab_size=1000",
    "data.max_articles=24",
    "window.tokens=4096",
    "window.tokens_per_micro_batch=512",
)


@dataclass(frozen=True)
class Link:
    """What lies between each client and the server."""

    rtt_ms: float = 0.0
    mbit: float | None = None

    @property
    def name(self) -> str:
        """For people and file names."""
        return f"{self.rtt_ms:g}ms" + (f"-{self.mbit:g}mbit" if self.mbit else "")

    def seconds(self, num_bytes: float) -> float:
        """Least time of an exchange: one round trip, and `num_bytes`, both ways counted."""
        return self.rtt_ms / 1000 + (num_bytes * 8 / (self.mbit * 1e6) if self.mbit else 0.0)


@dataclass(frozen=True)
class Setting:
    """One run of the benchmark."""

    system: str
    link: Link = Link()
    variant: str = ""
    """What is special about a run, for people."""
    overrides: tuple[str, ...] = ()

    @property
    def slug(self) -> str:
        """A folder name."""
        return "-".join(filter(None, [self.system, self.link.name, self.variant.replace(" ", "-")]))


@dataclass(frozen=True)
class PipelineOptions:
    """What a user gives the benchmark."""

    out: Path
    command: str
    work: Path = Path("runs/bench-pipeline")
    clients: int = 8
    rtt_ms: tuple[float, ...] = (0.0, 50.0, 200.0)
    mbit: float | None = 100.0
    quick: bool = False
    device: str = "cpu"
    """Of the body: cpu or cuda."""
    client_device: str = "cpu"
    links: Literal["proxy", "netem"] = "proxy"
    only: tuple[str, ...] = ()
    """Systems to run; empty for all."""
    overrides: tuple[str, ...] = ()

    def overrides_of(self, setting: Setting) -> tuple[str, ...]:
        """The run file's overrides for one setting."""
        quick = QUICK if self.quick else ()
        return (*quick, f"clients.expected={self.clients}", *self.overrides, *setting.overrides)


@dataclass(frozen=True)
class Run:
    """One setting with the text that all of them share."""

    setting: Setting
    options: PipelineOptions
    shards: Path
    """Folder of the clients' texts."""
    tokenizer: Path
    """Its folder."""

    @property
    def overrides(self) -> list[str]:
        """Of the run file, as a program is given them."""
        return [*self.options.overrides_of(self.setting), f"tokenizer.path={self.tokenizer.resolve()}"]

    @property
    def config(self) -> RunConfig:
        """The run file with its overrides."""
        return load_config(RUN_FILE, self.overrides)

    @property
    def folder(self) -> Path:
        """Of what the run leaves."""
        return self.options.work / self.setting.slug

    @property
    def log(self) -> Path:
        """Of its server or only process."""
        return self.options.work / f"{self.setting.slug}.log"

    @property
    def clients_log(self) -> Path:
        """Of its clients' process."""
        return self.log.with_suffix(".clients.log")

    def row(self, tokens_per_second: float, utilization: float, **more: Any) -> dict[str, Any]:
        """A row of the record; `more` replaces or adds fields."""
        config, link = self.config, self.setting.link
        return {
            "system": self.setting.system,
            "variant": self.setting.variant,
            "rtt_ms": link.rtt_ms,
            "mbit": link.mbit,
            "clients": config.clients.expected,
            "cut": config.cut if isinstance(config.cut, str) else config.cut.model_dump(),
            "codec": f"{config.wire.activations}/{config.wire.gradients}",
            "mode": None,
            "staleness": None,
            "tokens_per_second": tokens_per_second,
            "utilization": utilization,
            "utilization_bound": None,
            "bytes_per_token_up": 0.0,
            "bytes_per_token_down": 0.0,
            "bubble_share": 1.0 - utilization,
            "dummy_share": 0.0,
        } | more


@dataclass(frozen=True)
class Baseline:
    """Another way to train, run over every link after ours."""

    name: str
    variants: tuple[str, ...]
    """The first alone with `quick`."""
    measure: Callable[[Run], dict[str, Any]]
    """Returns a row of the record."""


def settings(options: PipelineOptions, baselines: Sequence[Baseline] = ()) -> Iterator[Setting]:
    """Everything that is run, in this order."""
    round_trips = options.rtt_ms[:1] if options.quick else options.rtt_ms
    links = [Link(rtt, options.mbit if rtt else None) for rtt in round_trips]
    wanted = options.only or (CENTRALIZED, OURS, *(baseline.name for baseline in baselines))
    if CENTRALIZED in wanted and not options.quick:
        yield Setting(CENTRALIZED, variant=BODY_ALONE)
    for link in links:
        first, *others = [Setting(OURS, link, variant, overrides) for variant, overrides in VARIANTS]
        # Before and after ours over every link: a machine is not equally fast all the time.
        centralized = [Setting(CENTRALIZED, link)] if CENTRALIZED in wanted else []
        yield from centralized
        if OURS in wanted:
            yield first
            if not options.quick:
                yield from centralized
                yield from others
        for baseline in baselines:
            if baseline.name in wanted:
                for variant in baseline.variants[: 1 if options.quick else None]:
                    yield Setting(baseline.name, link, variant)
