"""`fedbert-ds bench pipeline`: how busy clients behind slow links keep the body, beside what others do.

Three systems in one go, over the same text, body and links:
  centralized   the whole model in one process, its body under DeepSpeed; and that body alone, the ceiling of all
  ours          the real launcher with one rank, and real clients behind the links
  naive         one client at a time, padded fp32 tensors, pickle over HTTP
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedbert_ds.bench.network.link import DelayProxy, through
from fedbert_ds.bench.network.namespace import Namespace
from fedbert_ds.bench.pipeline.report import draw, sentence, table
from fedbert_ds.bench.pipeline.timeline import Shares, read_trace, shares
from fedbert_ds.bench.process import LONGEST_SECONDS, last_line, running, tell
from fedbert_ds.config import RunConfig, load_config
from fedbert_ds.errors import RunError
from fedbert_ds.telemetry.metrics import read_metrics
from fedbert_ds.telemetry.record import SOURCE, source_commit, write_record

if TYPE_CHECKING:
    from fedbert_ds.bench.pipeline.exchange import ExchangeWork

LAUNCHER = SOURCE / "launchers" / "pretrain.py"
RUN_FILE = SOURCE / "configs" / "pipeline.yaml"
SETTLING_WINDOWS = 3
"""Not counted: round trips are being measured and the depth follows them."""
START_SECONDS = 240.0
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
        """The least that an exchange takes in which so many bytes cross, both ways counted, and half wait for half."""
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


VARIANTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("", ()),
    ("fp32 embeddings", ("cut=embeddings", "wire.activations=fp32", "wire.gradients=fp32")),
    ("synchronous", ("federation.mode=synchronous", "wire.updates=int8")),
    ("synchronous, staleness 1", ("federation.mode=synchronous", "wire.updates=int8", "federation.staleness=1")),
)
"""Of ours: weights averaged rarely, rows at int8; an expensive wire; and halves exchanged after every window."""


CEILING = "body alone"
"""Of centralized: embeddings and head take no time, activations and gradients are at hand."""
KEPT = "connection kept"
"""Of naive: kinder than `requests.post`, which opens a connection for each request."""


def bench_pipeline(options: PipelineOptions) -> None:
    """Run every setting, print a row as each ends, write record and picture. UserError names a log when one fails."""
    if not LAUNCHER.is_file():
        raise RunError("bench pipeline runs launchers/pretrain.py: it needs the source tree, installed with pip -e")
    import torch

    from fedbert_ds.bench.device import describe
    from fedbert_ds.bench.text import prepare

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    options.work.mkdir(parents=True, exist_ok=True)
    config = load_config(RUN_FILE, _overrides(options, Setting("ours")))
    shards, tokenizer = prepare(config, options.work / ("quick" if options.quick else "text"), options.clients)
    commit, rows = source_commit(), []
    what = {"proxy": "a proxy that delays and limits", "netem": "the kernel's netem, in a network namespace"}
    print(f"links   {what[options.links]}; {options.clients} clients, one body process", flush=True)
    for setting in settings(options):
        row = _run(setting, options, shards, tokenizer)
        rows.append(row)
        print(sentence(row), flush=True)
    write_record(
        options.out,
        command=options.command,
        commit=commit,
        rows=rows,
        links=options.links,
        device=describe(torch.device(options.device)),
        client_device=options.client_device,
        settings=_settings(config),
    )
    picture = options.out.with_suffix(".png")
    draw(picture, rows)
    print(f"\n{table(rows)}\n\nrecord  {options.out}\npicture {picture}", flush=True)


def settings(options: PipelineOptions) -> Iterator[Setting]:
    """Everything that is run, in this order."""
    round_trips = options.rtt_ms[:1] if options.quick else options.rtt_ms
    links = [Link(rtt, options.mbit if rtt else None) for rtt in round_trips]
    wanted = options.only or ("centralized", "ours", "naive")
    if "centralized" in wanted and not options.quick:
        yield Setting("centralized", variant=CEILING)
    for link in links:
        first, *others = [Setting("ours", link, variant, overrides) for variant, overrides in VARIANTS]
        # Beside every link, before and after what is compared with it: a machine is not equally fast all the time.
        centralized = [Setting("centralized", link)] if "centralized" in wanted else []
        yield from centralized
        if "ours" in wanted:
            yield first
            if not options.quick:
                yield from centralized
                yield from others
        if "naive" in wanted:
            yield Setting("naive", link)
            if not options.quick:
                yield Setting("naive", link, KEPT)


def _overrides(options: PipelineOptions, setting: Setting) -> tuple[str, ...]:
    quick = QUICK if options.quick else ()
    return (*quick, f"clients.expected={options.clients}", *options.overrides, *setting.overrides)


def _run(setting: Setting, options: PipelineOptions, shards: Path, tokenizer: Path) -> dict[str, Any]:
    overrides = [*_overrides(options, setting), f"tokenizer.path={tokenizer.resolve()}"]
    config = load_config(RUN_FILE, overrides)
    log = options.work / f"{setting.slug}.log"
    text = ["--tokenizer", str(tokenizer), "--shards", str(shards)]
    if setting.system == "centralized":
        command = [sys.executable, "-m", "fedbert_ds.bench.body_alone", "--config", str(RUN_FILE), *text, *overrides]
        command += [] if setting.variant else ["--whole"]
        with running(command, log, options.device, answers=True) as process:
            measured = json.loads(last_line(process, log))
        return _row(setting, config, measured["tokens_per_second"], 1.0, 1.0, (0.0, 0.0), 0.0, 0.0)
    if setting.system == "naive":
        return _naive(setting, config, options, overrides, text, log)
    return _ours(setting, config, options, overrides, shards, tokenizer, log)


def _naive(
    setting: Setting,
    config: RunConfig,
    options: PipelineOptions,
    overrides: Sequence[str],
    text: Sequence[str],
    log: Path,
) -> dict[str, Any]:
    seconds = 3.0 if options.quick else 20.0
    naive = [sys.executable, "-m", "benchmarks.naive.trainer"]
    with ExitStack() as resources:
        reach = resources.enter_context(_reach(setting.link, options))
        command = [*naive, "serve", "--config", str(RUN_FILE), *text[:2], "--host", reach.host, *overrides]
        server = resources.enter_context(running(command, log, options.device, answers=True))
        # Clients start while the server does.
        client = ["train", "--config", str(RUN_FILE), *text, "--server", "-", "--seconds", str(seconds)]
        client += ["--keep-connection"] if setting.variant == KEPT else []
        command = [*reach.enter, *naive, *client, *overrides]
        clients_log = log.with_suffix(".clients.log")
        clients = resources.enter_context(
            running(command, clients_log, options.client_device, reach.environment, answers=True)
        )
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        if not address:
            raise RunError(f"the naive server did not start (see {log})")
        measured = json.loads(last_line(clients, clients_log, address + "\n"))
    tokens, busy = measured["tokens"], measured["busy_seconds"] / measured["seconds"]
    per_token = measured["bytes_up"] / tokens, measured["bytes_down"] / tokens
    return _row(setting, config, tokens / measured["seconds"], busy, None, per_token, 1.0 - busy, 0.0)


def _ours(
    setting: Setting,
    config: RunConfig,
    options: PipelineOptions,
    overrides: list[str],
    shards: Path,
    tokenizer: Path,
    log: Path,
) -> dict[str, Any]:
    import shutil

    from fedbert_ds.bench.pipeline.exchange import exchange_work
    from fedbert_ds.data.tokenizer import load_tokenizer

    folder = options.work / setting.slug
    shutil.rmtree(folder, ignore_errors=True)
    state = folder.with_name(f"{folder.name}.state")
    shutil.rmtree(state, ignore_errors=True)
    with ExitStack() as resources:
        reach = resources.enter_context(_reach(setting.link, options))
        own = [*overrides, f"run.directory={folder}", f"server.host={reach.host}"]
        command = [sys.executable, str(LAUNCHER), "--config", str(RUN_FILE), *own]
        server = resources.enter_context(running(command, log, options.device))
        # Clients start while the server does.
        load = ["--server", "-", "--shards", str(shards), "--state", str(state)]
        load += ["--device", options.client_device]
        command = [*reach.enter, sys.executable, "-m", "fedbert_ds.bench.pipeline.load", *load]
        clients_log = log.with_suffix(".clients.log")
        clients = resources.enter_context(running(command, clients_log, options.client_device, reach.environment))
        tell(clients, _address(folder, server, log))
        _wait(server, clients, log)
    windows = read_metrics(folder / "metrics.jsonl")[SETTLING_WINDOWS:]
    seconds = sum(window.seconds for window in windows)
    tokens = sum(window.tokens for window in windows)
    busy = sum(window.busy_seconds for window in windows)
    spent = shares(read_trace(folder / "trace-0.json"), windows[0].window, windows[-1].window)
    per_token = sum(w.bytes_up for w in windows) / tokens, sum(w.bytes_down for w in windows) / tokens
    averaging = sum(w.averaging_bytes_up + w.averaging_bytes_down for w in windows) / tokens
    bubble = _bubble(
        spent,
        config,
        setting.link,
        averaging * tokens / len(windows) / config.clients.expected,
        lambda: exchange_work(config, load_tokenizer(str(tokenizer))),
    )
    bound = busy / (busy + bubble * len(windows))
    dummies = sum(w.dummy_micro_batches for w in windows) / sum(w.forwards for w in windows)
    row = _row(setting, config, tokens / seconds, busy / seconds, bound, per_token, 1 - busy / seconds, dummies)
    measured = {
        "forward": spent.forward / tokens,
        "backward": spent.backward / tokens,
        "messages": spent.messages / spent.micro_batches,
        "step": spent.step / len(windows),
        "gather": spent.gather / len(windows),
        "wait": spent.wait / len(windows),
        "activations": spent.activations,
        "gradient": spent.gradient,
    }
    return row | {
        "bytes_per_token_averaging": averaging,
        "window_tokens": tokens / len(windows),
        "micro_batches": spent.micro_batches / len(windows),
        "seconds": measured,
    }


def _bubble(
    spent: Shares, config: RunConfig, link: Link, half_bytes: float, measure_work: Callable[[], ExchangeWork]
) -> float:
    """Seconds that a window's end costs at least: two round trips, a client's work, an exchange that is waited for.

    `half_bytes` is what crosses a client's link, both ways, to exchange halves once, and `measure_work` tells what that
    costs it; it takes seconds, so it is asked only where the exchange is waited for.
    """
    # One round trip is in each of the two answers.
    seconds = spent.activations + spent.gradient
    if config.federation.mode == "synchronous" and not config.federation.staleness:
        work = measure_work()
        # Nothing of the next window can be computed before halves have crossed the link both ways. Clients share a
        # processor here: all of them have sent before there is a sum, and one has taken it before there is a forward.
        seconds += link.seconds(half_bytes) + config.clients.expected * work.send + work.take
    return seconds


def _row(
    setting: Setting,
    config: RunConfig,
    tokens_per_second: float,
    utilization: float,
    bound: float | None,
    bytes_per_token: tuple[float, float],
    bubble: float,
    dummies: float,
) -> dict[str, Any]:
    naive = setting.system == "naive"
    return {
        "system": setting.system,
        "variant": setting.variant,
        "rtt_ms": setting.link.rtt_ms,
        "mbit": setting.link.mbit,
        "clients": 0 if setting.system == "centralized" else config.clients.expected,
        "cut": "embeddings" if naive else config.cut if isinstance(config.cut, str) else config.cut.model_dump(),
        "codec": "fp32, padded" if naive else f"{config.wire.activations}/{config.wire.gradients}",
        "mode": None if setting.system != "ours" else config.federation.mode,
        "staleness": None if setting.system != "ours" else config.federation.staleness,
        "tokens_per_second": tokens_per_second,
        "utilization": utilization,
        "utilization_bound": bound,
        "bytes_per_token_up": bytes_per_token[0],
        "bytes_per_token_down": bytes_per_token[1],
        "bubble_share": bubble,
        "dummy_share": dummies,
    }


# -- links and processes --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reach:
    """How clients reach the server."""

    host: str
    """Where the server listens."""
    environment: dict[str, str]
    """Of the clients' process."""
    enter: tuple[str, ...]
    """Before the clients' command."""


@contextmanager
def _reach(link: Link, options: PipelineOptions) -> Iterator[_Reach]:
    if link == Link():
        yield _Reach("127.0.0.1", {}, ())
    elif options.links == "netem":
        # One link for the process that all clients are in, as wide as all of theirs.
        with Namespace(link.rtt_ms / 2, link.mbit and link.mbit * options.clients) as there:
            yield _Reach(there.host, {}, there.enter)
    else:
        with DelayProxy(delay_ms=link.rtt_ms / 2, mbit=link.mbit) as address:
            yield _Reach("127.0.0.1", through(address), ())


def _address(folder: Path, server: subprocess.Popen[str], log: Path) -> str:
    path, deadline = folder / "server.address", time.monotonic() + START_SECONDS
    while not path.is_file():
        if server.poll() is not None or time.monotonic() > deadline:
            raise RunError(f"the server did not start (see {log})")
        time.sleep(0.05)
    return path.read_text().strip()


def _wait(server: subprocess.Popen[str], clients: subprocess.Popen[str], log: Path) -> None:
    deadline = time.monotonic() + LONGEST_SECONDS
    while server.poll() is None:
        if clients.poll() not in (None, 0):
            raise RunError(f"clients failed (see {log.with_suffix('.clients.log')})")
        if time.monotonic() > deadline:
            raise RunError(f"a run took more than {LONGEST_SECONDS / 60:.0f} minutes (see {log})")
        time.sleep(0.1)
    if server.returncode:
        raise RunError(f"the server failed (see {log})")


def _settings(config: RunConfig) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(_without_paths(config).model_dump_json())
    return {name: tree[name] for name in ("model", "data", "window", "optimizer", "body", "federation")}


def _without_paths(config: RunConfig) -> RunConfig:
    """The run file with no path of this machine in it."""
    return config.model_copy(
        update={"body": config.body.model_copy(update={"deepspeed": Path(config.body.deepspeed.name)})}
    )
