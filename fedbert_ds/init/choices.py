"""The values of a new run file, each with its reason: from what there is, by the planner."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedbert_ds.config import RunConfig
from fedbert_ds.errors import ConfigError
from fedbert_ds.init.sizes import POSITIONS, SIZES
from fedbert_ds.run_file import parse_config

ENOUGH = 0.8
"""Share of the fastest choice's speed with which a better one is taken."""
WINDOW_TOKENS = tuple(4096 << doubling for doubling in range(9))
"""Candidates for the tokens of a window, up to a million."""
BERTS_WINDOW = 131_072
"""Tokens of a step in the BERT paper: 256 sequences of 512."""
FEWEST_WINDOWS = 1000
"""Steps that a run should have before its windows become as large as BERT's."""
LAMB_WINDOWS, LAMB_RATE = 15_625, 5e-3
"""Steps and learning rate of BERT's training with the largest batches in You et al. 2020; the rate
falls with the square root of the steps."""
ON_GPU, ON_CPU = 8192, 2048
"""Tokens of a micro-batch."""
EVALUATIONS = 20
SAVE_HOURS = 0.5
START_HOURS = 1.0
"""Owners start their clients by hand."""
HERE, DECIDE = "Here: ", "DECIDE: "
"""Begin a reason: of a value that was chosen, and of one that only the user knows."""


@dataclass(frozen=True)
class Way:
    """A mode and a cut, from exact and private to fast."""

    mode: str
    average_every: int
    cut: str
    says: str


WAYS = (
    Way("synchronous", 1, "embeddings", "equals centralized training"),
    Way("synchronous", 1, "rows", "equals centralized training, and sends fewer bytes"),
    Way("parallel", 50, "embeddings", "averages client models every 50 windows"),
    Way("parallel", 50, "rows", "averages client models every 50 windows, and sends fewer bytes"),
)
"""In the order in which they are preferred."""
ALL_HERE = WAYS[:1]
"""Where all clients are on this machine, links hold nothing back."""


@dataclass(frozen=True)
class Wanted:
    """What the user says."""

    size: str = "base"
    clients: int = 4
    gpus: int = 1
    """0 trains on the CPU."""
    hours: float = 24.0
    name: str = "run"
    """Of the run's folder below `runs/`."""
    host: str = "body.example"
    """The name under which clients reach the server."""
    tokenizer: str | None = None
    """Hub name or folder; None: BERT's, or one trained on `data`."""
    data: tuple[str, ...] = ()
    """Text for clients that the launcher starts on this machine; none: owners bring their own."""


Speed = Callable[[RunConfig], float]
"""Tokens a second that the planner predicts for a run file."""


@dataclass(frozen=True)
class Choice:
    """A run file as a mapping, and the reason of a value by `section.key`."""

    tree: Mapping[str, Any]
    reasons: Mapping[str, str]
    config: RunConfig
    tokens_per_second: float


@dataclass
class _Draft:
    """Values and reasons while they are being chosen."""

    tree: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def set(self, name: str, value: Any, reason: str = "", begin: str = HERE) -> None:
        *sections, key = name.split(".")
        node = self.tree
        for section in sections:
            node = node.setdefault(section, {})
        node[key] = value
        if reason:
            self.reasons[name] = begin + reason

    @property
    def config(self) -> RunConfig:
        return parse_config(self.tree, "fedbert-ds init")


def choose(wanted: Wanted, speed: Speed) -> Choice:
    """Values for a run file. `speed` is asked for some twenty candidates.

    Raises ConfigError for numbers that make no run.
    """
    _check(wanted)
    draft = _Draft()
    _places(draft, wanted)
    draft.set("run.windows", 1)
    _machines(draft, wanted)
    way, rates = _way(draft, wanted, speed)
    tokens, rate = _window(draft, wanted, speed, rates[way])
    windows = max(1, round(rate * wanted.hours * 3600 / tokens))
    if way.average_every > 1:
        # Clients that average rarely still must do so.
        windows = max(way.average_every, windows)
    _length(draft, wanted, windows, rate)
    return Choice(draft.tree, draft.reasons, draft.config, rate)


def _check(wanted: Wanted) -> None:
    if wanted.size not in SIZES:
        raise ConfigError(f"--size {wanted.size}: choose {', '.join(SIZES)}")
    if wanted.gpus < 0:
        raise ConfigError(f"--gpus {wanted.gpus}: a number of GPUs; 0 is for none")
    if wanted.clients < 1:
        raise ConfigError(f"--clients {wanted.clients}: at least 1")
    if not 0.0 < wanted.hours < math.inf:
        raise ConfigError(f"--hours {wanted.hours}: hours of training; give more than 0")


def _places(draft: _Draft, wanted: Wanted) -> None:
    """Folders, model, tokenizer, text, clients and server."""
    size = SIZES[wanted.size]
    draft.set("run.directory", f"runs/{wanted.name}")
    draft.set("model.architecture", "bert", "or set model.checkpoint alone, to continue a public model")
    published = f"as BERT-{wanted.size} was published"
    draft.set("model.num_hidden_layers", size.layers, published)
    draft.set("model.hidden_size", size.hidden, published)
    draft.set("model.num_attention_heads", size.heads, published)
    draft.set("model.max_position_embeddings", POSITIONS, published)
    draft.set("model.initializer_range", size.initializer_range)
    if wanted.tokenizer or not wanted.data:
        draft.set(
            "tokenizer.path",
            wanted.tokenizer or "bert-base-uncased",
            ""
            if wanted.tokenizer
            else "a vocabulary that reads the owners' language and their words; "
            "docs/vocabulary.md makes one of all owners' word counts",
            DECIDE,
        )
    else:
        draft.set("tokenizer.vocab_size", min(30_522, 64 * size.hidden))
    if wanted.data:
        draft.set("data.source", list(wanted.data))
    draft.set("data.sequence_length", size.sequence_length, "sequences are not padded, so short texts cost no more")
    draft.set("data.client_held_out", 0.05, "these texts tell whether the model learns")
    draft.set("clients.expected", wanted.clients)
    draft.set("clients.local", wanted.clients if wanted.data else 0)
    if wanted.data:
        return
    draft.set("clients.minimum", max(1, 3 * wanted.clients // 4), "three quarters may go on without the rest")
    draft.set("clients.join_timeout", START_HOURS * 3600, "an hour, for owners who start their clients by hand")
    draft.set("server.host", "0.0.0.0")
    draft.set("server.port", 29600, f"open {_ports(wanted.gpus)} in the server's firewall")
    draft.set("server.advertise", wanted.host, "a name that the owners' machines can look up", DECIDE)
    draft.set("server.tls.ca", "certs/ca.pem", "who signs certificates; `fedbert-ds certs` makes these files", DECIDE)
    draft.set("server.tls.certificate", f"certs/{wanted.host}.pem")
    draft.set("server.tls.key", f"certs/{wanted.host}.key")


def _ports(gpus: int) -> str:
    return f"TCP ports 29600 to {29600 + gpus - 1}, one for each GPU," if gpus > 1 else "this TCP port"


def _machines(draft: _Draft, wanted: Wanted) -> None:
    """What the body's machine asks for."""
    on_gpu = wanted.gpus > 0
    draft.set("body.zero_stage", 1 if wanted.gpus > 1 else 0, "the body of any BERT fits one GPU")
    draft.set("body.precision", "bf16" if on_gpu else "fp32", "for GPUs" if on_gpu else "for a CPU")
    draft.set("optimizer.name", "lamb", "its steps fit any width, and large windows")
    if not wanted.data:
        draft.set(
            "wire.activations",
            "int8",
            "a fourth of fp32's bytes. Results are rounded, "
            "so a run is near centralized training and no longer equal to it; docs/wire.md has figures",
        )
        draft.set("wire.gradients", "int8")


def _way(draft: _Draft, wanted: Wanted, speed: Speed) -> tuple[Way, dict[Way, float]]:
    """The first way that is fast enough, and the speeds of all."""
    rates = {}
    for way in (ways := ALL_HERE if wanted.data else WAYS):
        _set_way(draft, way)
        _set_tokens(draft, wanted, max(WINDOW_TOKENS))
        rates[way] = speed(draft.config)
    fastest = max(rates.values())
    chosen = next(way for way in ways if rates[way] >= ENOUGH * fastest)
    _set_way(draft, chosen)
    told = "; ".join(f"{way.mode} with cut {way.cut} {rates[way]:,.0f}" for way in ways)
    draft.reasons["federation.mode"] = f"{HERE}it {chosen.says}. Tokens a second by the planner: {told}"
    return chosen, rates


def _set_way(draft: _Draft, way: Way) -> None:
    draft.set("cut", way.cut, "what the server sees with each cut: README.md, What crosses the wire")
    draft.set("federation.mode", way.mode)
    draft.set("federation.average_every", way.average_every)


def _set_tokens(draft: _Draft, wanted: Wanted, tokens: int) -> int:
    """Sets a window of about so many tokens, and its micro-batches; returns how many it has."""
    length = draft.tree["data"]["sequence_length"]
    tokens = max(tokens, wanted.clients * length, max(1, wanted.gpus) * length)
    ranks = max(1, wanted.gpus)
    micro_batch = max(length, min(ON_GPU if wanted.gpus else ON_CPU, tokens // (2 * ranks)))
    draft.set("window.tokens", tokens)
    draft.set("window.tokens_per_micro_batch", micro_batch, "enough for a GPU to be busy" if wanted.gpus else "")
    together = min(wanted.clients, math.ceil(micro_batch / (tokens / wanted.clients)))
    draft.set("window.clients_per_micro_batch", together, "so many fill a micro-batch with their part of a window")
    return tokens


def _window(draft: _Draft, wanted: Wanted, speed: Speed, rate: float) -> tuple[int, float]:
    """Sets the smallest window that is fast enough; returns its tokens and tokens a second.

    Smaller windows are more steps. They are as large as BERT's where that leaves enough of them.
    """
    budget = rate * wanted.hours * 3600
    least = min(BERTS_WINDOW, budget / FEWEST_WINDOWS)
    candidates = [tokens for tokens in WINDOW_TOKENS if tokens >= least] or [max(WINDOW_TOKENS)]
    for candidate in candidates:
        tokens = _set_tokens(draft, wanted, candidate)
        found = speed(draft.config)
        if found >= ENOUGH * rate:
            break
    draft.reasons["window.tokens"] = (
        f"{HERE}the smallest that the planner finds fast enough, with {found:,.0f} tokens a second; the largest that "
        f"was tried has {rate:,.0f}"
    )
    return tokens, found


def _length(draft: _Draft, wanted: Wanted, windows: int, rate: float) -> None:
    """Sets what follows from the number of windows."""
    period = draft.tree["federation"]["average_every"]
    windows = math.ceil(windows / period) * period
    per_hour = windows / wanted.hours
    told = f"{wanted.hours:g} hours at {rate:,.0f} tokens a second, as the planner predicts"
    few = f". These are few for a model to learn, {FEWEST_WINDOWS:,} or more are usual: give it more --hours"
    draft.set("run.windows", windows, told + few * (windows < FEWEST_WINDOWS))
    draft.set("run.save_every", max(1, min(windows, round(SAVE_HOURS * per_hour))), "about every half hour")
    draft.set("run.evaluate_every", max(1, windows // EVALUATIONS), f"{EVALUATIONS} in this run")
    peak = LAMB_RATE * min(1.0, math.sqrt(LAMB_WINDOWS / windows))
    draft.set("optimizer.lr", float(f"{peak:.1e}"), "by You et al. 2020 for so many steps of LAMB")
    draft.set("optimizer.warmup_windows", windows // 20, "a twentieth of the run")
