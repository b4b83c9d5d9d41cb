"""How much activations and gradients of a rank's clients may count for in the body.

What is typical follows from the windows before, of the clients of all ranks: each client has one
vote. It changes between two windows alone, so it depends on no order of messages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch

from fedbert_ds.errors import WireError
from fedbert_ds.federation.influence import shrinking, typical
from fedbert_ds.server.contract import Observed, Sizes
from fedbert_kernels.encoded import Encoded

SLACK_ROWS = 16
"""Rows that a piece may count for beside its own: few differ more from the typical than many do."""
NOTHING = 1e-6
"""A row of activations that is so small a part of a typical one is none: what comes first in the
body divides by its size.
"""

Bounded = Callable[[str, str, float], None]
"""(client, what it sent, how many times what may count it was)"""


class Influence:
    """Scales down what is more than `times` what is typical (None: nothing), and tells `bounded`.

    Sizes are of a piece as a whole: in some models a few rows of activations are honestly many
    times larger than the others. A row of activations `times` squared times smaller than is typical
    is scaled up to that, since a body divides by its size. `first` is typical until clients have
    been heard.
    """

    def __init__(self, times: float | None, first: Sizes | None, bounded: Bounded) -> None:
        self._times = times
        self._first = first
        self._bounded = bounded
        self._votes: dict[str, Sizes] = {}
        """What each client sent last."""
        self._typical = first
        self._masked_tokens = 1
        self._observed: dict[str, Observed] = {}

    def begin(self, masked_tokens: int) -> None:
        """A window begins. Its loss is a mean over `masked_tokens`, those of all ranks."""
        self._masked_tokens = max(1, masked_tokens)
        self._observed = {}

    def check(self, who: str, values: Encoded) -> None:
        """WireError for activations that are nothing, before they can meet another client's."""
        if self._times is None or self._typical is None or not len(values):
            return
        least = float(values.row_sizes.min())
        if not least > NOTHING * self._typical.row:
            raise WireError(f"{who}: a row of size {least:.3g}; {self._typical.row:.3g} is typical")

    def activations(self, client: str, values: Encoded) -> Encoded:
        """A piece's activations as they may count."""
        if self._times is None:
            return values
        sizes = values.row_sizes
        observed = self._observed.setdefault(client, Observed())
        observed.rows += len(values)
        observed.row_squares += float(sizes.double().square().sum())
        if self._typical is None or not len(values):
            return values
        norm = float(torch.linalg.vector_norm(sizes, dtype=torch.float64))
        factor, times = self._allowed(norm, self._typical.row, len(values))
        least = self._typical.row / self._times**2
        smallest = float(sizes.min()) * factor
        if factor == 1.0 and smallest >= least:
            return values
        self._bounded(client, "activations", max(times, least / smallest))
        return values.times((sizes * factor).clamp(min=least) / sizes)

    def gradient(self, client: str, values: Encoded) -> Encoded:
        """d(loss)/d(hidden) of a piece as it may count; the loss is the window's mean."""
        if self._times is None:
            return values
        masked, norm = len(values), values.norm
        observed = self._observed.setdefault(client, Observed())
        observed.masked += masked
        observed.gradient_squares += (norm * self._masked_tokens) ** 2
        if self._typical is None:
            return values
        factor, times = self._allowed(norm, self._typical.token / self._masked_tokens, masked)
        if factor == 1.0:
            return values
        self._bounded(client, "gradient", times)
        return values.times(torch.full((masked,), factor))

    def losses(self, losses: Mapping[str, tuple[float, int]]) -> None:
        """What clients say that their loss was: (sum of cross-entropies in nats, masked tokens)."""
        for client, (loss_sum, masked) in losses.items():
            observed = self._observed.setdefault(client, Observed())
            observed.loss_sum, observed.loss_tokens = loss_sum, masked

    def take(self) -> dict[str, Observed]:
        """What this rank's clients have sent for the window that has ended, once."""
        observed, self._observed = self._observed, {}
        return observed

    def learn(self, observed: Iterable[Mapping[str, Observed]]) -> None:
        """What the clients of each rank have sent: what is typical follows from it."""
        for of_rank in observed:
            for client, seen in sorted(of_rank.items()):
                before = self._votes.pop(client, None) or Sizes(0.0, 0.0)
                row = math.sqrt(seen.row_squares / seen.rows) if seen.rows else before.row
                token = math.sqrt(seen.gradient_squares / seen.masked) if seen.masked else before.token
                self._votes[client] = Sizes(row, token)
        while len(self._votes) > MOST_REMEMBERED:
            del self._votes[next(iter(self._votes))]
        self._settle()

    def state(self) -> dict[str, tuple[float, float]]:
        """What each client sent last, for a checkpoint."""
        return {client: (vote.row, vote.token) for client, vote in self._votes.items()}

    def load_state(self, state: Mapping[str, tuple[float, float]]) -> None:
        """Go on from `state`."""
        self._votes = {client: Sizes(*vote) for client, vote in state.items()}
        self._observed = {}
        self._settle()

    def _allowed(self, norm: float, typical_row: float, rows: int) -> tuple[float, float]:
        """(what to multiply a piece of so many rows by, how many times what may count it is)."""
        assert self._times is not None
        most = self._times * typical_row * math.sqrt(rows + SLACK_ROWS)
        return shrinking(norm, most), norm / most if most else math.inf

    def _settle(self) -> None:
        rows = [vote.row for vote in self._votes.values() if vote.row]
        tokens = [vote.token for vote in self._votes.values() if vote.token]
        first = self._first
        if first is None and not (rows and tokens):
            self._typical = None
            return
        self._typical = Sizes(
            typical(rows) if rows or first is None else first.row,
            typical(tokens) if tokens or first is None else first.token,
        )


MOST_REMEMBERED = 4096
"""Clients whose last vote is remembered."""
