"""Typed data of a rank's rooms: what clients may send, what ranks count and exchange."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fedbert_ds.config import Codec, UpdateCodec
from fedbert_ds.server.queue.in_flight import Demand
from fedbert_kernels.encoded import Encoded

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Sizes:
    """What is typical of what a client sends in a window."""

    row: float
    """Norm of a row of activations; the root of the mean square."""
    token: float
    """Norm of d(loss)/d(hidden) of a masked token, for a loss that is a sum over tokens; the root
    of the mean square.
    """


@dataclass(frozen=True)
class TensorContract:
    """Form of every tensor of one kind. The plan adds the number of rows."""

    codec: Codec
    width: int
    most_rows: int
    """Most rows of a piece, which bounds the memory for one."""
    is_gradient: bool = False


@dataclass(frozen=True)
class Contract:
    """Form of every client message, the same for all clients of a run."""

    activations: TensorContract
    gradients: TensorContract
    longest_sequence: int
    """Tokens of the longest sequence."""
    is_rows_cut: bool
    exchanged: Shapes
    """Shapes of the tensors in client updates, by name."""
    handed_over: Shapes
    """Shapes of the tensors of a client half that it hands over for the result, by name."""
    update_codec: UpdateCodec = "fp32"
    """Codec of the matrices in client updates. What is handed over travels in fp32."""
    num_counts: int = 0
    """Numbers in an evaluation that a task's measures are made of."""
    mask_probability: float = 1.0
    """Share of tokens that clients mask."""
    first_sizes: Sizes | None = None
    """What is typical as long as no client has sent anything. None: unknown."""


@dataclass
class Observed:
    """What a client has sent for one window, as the body saw it: sizes before any bound."""

    rows: int = 0
    row_squares: float = 0.0
    """Squares of the norms of all rows of activations."""
    masked: int = 0
    gradient_squares: float = 0.0
    """Squares of d(loss)/d(hidden) for a loss that is a sum over masked tokens."""
    loss_sum: float = 0.0
    """Cross-entropies it reports, nats."""
    loss_tokens: int = 0
    """Masked tokens that `loss_sum` covers."""


@dataclass(frozen=True)
class Arrived:
    """A piece's activations, as they arrived."""

    values: Encoded
    """[tokens, width], or [rows, width] with cut: rows."""
    row_index: Tensor | None
    """[tokens] int64 into `values`, with cut: rows."""
    masked_positions: Tensor
    """[masked] int64, within the piece."""


@dataclass
class Tally:
    """Counts of one rank over one window."""

    loss_sum: float = 0.0
    """Sum of the cross-entropies of all masked tokens, nats."""
    tokens: int = 0
    masked_tokens: int = 0
    lost_masked_tokens: int = 0
    squared_lengths: int = 0
    """Sum of the squares of the sequences' lengths: what attention costs."""
    seconds: float = 0.0
    """Wall time since the counts of the window before."""
    busy_seconds: float = 0.0
    """Forwards and backwards, on the device."""
    step_seconds: float = 0.0
    """The optimizer's step, with its waits for other ranks."""
    wait_seconds: float = 0.0
    """Waits for clients."""
    rank_wait_seconds: float = 0.0
    """Waits for other ranks outside the step."""
    saving_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    """Evaluations, with their waits."""
    forwards: int = 0
    backwards: int = 0
    dummy_micro_batches: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    update_bytes_up: int = 0
    update_bytes_down: int = 0
    evaluation_bytes: int = 0
    """Both ways; not among the others."""
    recompiles: int = 0
    """Graphs that torch.compile made."""
    bounded: int = 0
    """What clients sent that was too large and was scaled down: pieces and updates."""


@dataclass(frozen=True)
class RankStatus:
    """A rank's message to the other ranks between two windows."""

    num_micro_batches: int
    """Micro-batches of the next window on this rank."""
    masked_tokens: int
    """Masked tokens of the next window on this rank."""
    demand: Demand
    clients: frozenset[str]
    """Connected clients."""
    stop: bool
    problems: tuple[str, ...]
    """The last problems with clients, a sentence each."""
    new_problems: tuple[str, ...]
    """Problems of the window that has just ended."""
    tally: Tally = field(default_factory=Tally)
    active: frozenset[str] = frozenset()
    """Those of `clients` that are not suspended."""
    absent: frozenset[str] = frozenset()
    """Clients of this rank without which no window may begin."""
    detached: frozenset[str] = frozenset()
    """Clients of this rank that have lost their connection and may still come back to it."""
    observed: Mapping[str, Observed] = field(default_factory=dict)
    """Of the window that has just ended, by client."""
    doubt: str = ""
    """What made this rank doubt that the body makes finite results; at ZeRO stage 3."""
    is_asked: bool = False
    """This rank has heard clients that want to join."""
    has_given_up: bool = False
    """This rank has waited for clients for `clients.join_timeout`."""
    lost_elsewhere: str = ""
    """Why the aggregator of another party is gone for this rank, if it is."""
    opened_elsewhere: bytes = b""
    """From rank 0: what that aggregator said when it came back."""
