"""What a plan is made for: body, clients and links as numbers."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Literal

from fedbert_ds.federation.strategy import Strategy


@dataclass(frozen=True)
class BodyCosts:
    """Seconds that one rank's body takes."""

    forward_per_token: float
    """Seconds a token."""
    backward_per_token: float
    """Seconds a token."""
    per_micro_batch: float = 0.0
    """Seconds a micro-batch takes to be received, packed and sent; not counted as busy."""
    step: float = 0.0
    """Seconds of the optimizer's step, collectives included."""
    gather: float = 0.0
    """Seconds the ranks take to agree on the next window."""
    launch: float = 0.0
    """Seconds the host takes to launch a forward and a backward; a faster device waits for it."""


@dataclass(frozen=True)
class ClientCosts:
    """One client's machine and link."""

    embed_per_token: float
    """Seconds a token, forward of the embeddings; the backward counts the same."""
    head_per_token: float
    """Seconds a token, head and loss, forward and backward; a mean over masked and other tokens."""
    per_message: float = 0.0
    """Seconds a message takes at the client beside its tokens."""
    rtt: float = 0.0
    """Seconds of a round trip."""
    up: float = float("inf")
    """Bytes a second to the server."""
    down: float = float("inf")
    """Bytes a second from the server."""


@dataclass(frozen=True)
class Wire:
    """Bytes a token on the wire, unless said otherwise."""

    activations: float
    hidden: float
    gradient: float
    """Of hidden states, up."""
    input_gradient: float
    update: float = 0.0
    """Bytes of a client update, each way."""

    @property
    def up(self) -> float:
        """Bytes a token to the server, without updates."""
        return self.activations + self.gradient

    @property
    def down(self) -> float:
        """Bytes a token from the server, without updates."""
        return self.hidden + self.input_gradient


@dataclass(frozen=True)
class Scenario:
    """A federation to predict."""

    body: BodyCosts
    clients: tuple[ClientCosts, ...]
    wire: Wire
    strategy: Strategy
    tokens_per_window: int
    tokens_per_micro_batch: int
    sequence_tokens: int = 128
    """Tokens of a sequence; all alike."""
    num_ranks: int = 1
    clients_per_micro_batch: int = 1
    micro_batches_in_flight: int | Literal["auto"] = "auto"
    affordable_in_flight: int = 64
    """Micro-batches in flight that memory holds."""
    bytes_kept_per_token: float = 0.0
    """What a micro-batch in flight keeps of a GPU's memory; 0 if unknown."""
    staleness: int = 0
    client_cores: int | None = None
    """Cores that all clients share, if they run on one machine; None: each client has its own."""
    server_bytes_per_second: float = float("inf")
    """Of each rank's network, each way, or of the threads that compress and decompress."""
    combine_per_byte: float = 2e-9
    """Seconds the server takes to combine a byte of each client's update."""

    @property
    def num_participants(self) -> int:
        """Clients that take part in a window."""
        return self.strategy.num_participants(len(self.clients))

    def exchanges(self, window: int) -> bool:
        """Whether clients exchange updates after this window."""
        return self.strategy.exchange_after(window) != "nothing"


@dataclass(frozen=True)
class Spread:
    """How unequal clients are: log-normal factors on typical costs."""

    speed: float = 0.0
    """Standard deviation of the logarithm of a client's seconds."""
    link: float = 0.0
    """Standard deviation of the logarithm of a client's round trip, and of one over its rates."""
    seed: int = field(default=0)

    def clients(self, typical: ClientCosts, count: int) -> tuple[ClientCosts, ...]:
        """`count` clients around a typical one."""
        chance = random.Random(self.seed)
        made = []
        for _ in range(count):
            slow, far = chance.lognormvariate(0.0, self.speed), chance.lognormvariate(0.0, self.link)
            made.append(
                ClientCosts(
                    typical.embed_per_token * slow,
                    typical.head_per_token * slow,
                    typical.per_message * slow,
                    typical.rtt * far,
                    typical.up / far,
                    typical.down / far,
                )
            )
        return tuple(made)
