"""The rules of each federated mode, pure; clients, server and planner ask the same object.

A strategy says what clients send after a window, how it is combined and what clients do with that:

    exchange       a client sends                     the server    a client then
    "gradients"    its share of the whole gradient    sums          steps with the sum
    "weights"      its weights, or their change       averages      takes the answer over
    "nothing"      nothing                                          has stepped by itself

The answer is the average, or what a server optimizer makes of it. Where clients hold the whole
model there is no body, and each trains its windows by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from fedbert_ds.config import Cut, FederationSection, UpdateCodec, WireSection

Exchange = Literal["nothing", "gradients", "weights"]
Scope = Literal["embeddings", "head"]


class Strategy(Protocol):
    """What the federated mode decides."""

    @property
    def update_codec(self) -> UpdateCodec:
        """Codec of the matrices in client updates, up and down."""

    @property
    def sends_changes(self) -> bool:
        """Clients send the change of their weights since the last average, not the weights."""

    @property
    def keeps_rounding(self) -> bool:
        """What the codec's rounding takes from an answer is added to the next answer."""

    @property
    def trains_alone(self) -> bool:
        """A client trains its windows by itself and reports its loss: there is no body."""

    @property
    def result_is_reference(self) -> bool:
        """The run's result is the reference; otherwise the average of the clients' halves."""

    @property
    def needs_every_window(self) -> bool:
        """A client may save its state only after it has taken every window before it."""

    @property
    def exchanges_per_window(self) -> float:
        """Exchanges a window, on average."""

    @property
    def clips_together(self) -> bool:
        """Gradients of body and client model are one gradient, clipped by one norm, at the server.

        Otherwise the server clips the body's, and each client those of its half.
        """

    def exchange_after(self, window: int) -> Exchange:
        """What every client sends after window `window` (0-based), and gets back combined."""

    def takes_part(self, scope: Scope) -> bool:
        """Parameters of this scope are exchanged; all others stay personal to their client."""

    @property
    def halves_are_personal(self) -> bool:
        """A client's half holds what the reference does not: personal parts, moments of its own.

        Then clients save their state themselves. Otherwise every half is the reference, which the
        aggregator has.
        """


@dataclass(frozen=True)
class Synchronous:
    """Gradients are summed every window: each client takes the step of centralized training."""

    update_codec: UpdateCodec
    clips_together: bool = True
    sends_changes = False
    keeps_rounding = False
    trains_alone = False
    result_is_reference = True
    halves_are_personal = False
    needs_every_window = True
    exchanges_per_window = 1.0

    def exchange_after(self, window: int) -> Exchange:
        """Gradients, every window."""
        return "gradients"

    def takes_part(self, scope: Scope) -> bool:
        """Everything: there is one model."""
        return True


@dataclass(frozen=True)
class Parallel:
    """Clients step alone; weights are averaged every `average_every` windows.

    FedAvg, McMahan et al. 2017.
    """

    update_codec: UpdateCodec
    average_every: int
    scopes: frozenset[Scope]
    """Parts of the client half that are averaged."""
    trains_alone = False
    result_is_reference = False
    halves_are_personal = True
    needs_every_window = False
    clips_together = False

    @property
    def sends_changes(self) -> bool:
        """Coded, a small change loses less than the weights would."""
        return self.update_codec != "fp32"

    @property
    def keeps_rounding(self) -> bool:
        """Two bits lose an eighth of an answer's square; other codecs, little."""
        return self.update_codec == "int2_hadamard"

    @property
    def exchanges_per_window(self) -> float:
        """One in `average_every` windows."""
        return 1.0 / self.average_every

    def exchange_after(self, window: int) -> Exchange:
        """Weights, after the last of every `average_every` windows."""
        return "weights" if (window + 1) % self.average_every == 0 else "nothing"

    def takes_part(self, scope: Scope) -> bool:
        """The parts that the run file averages."""
        return scope in self.scopes


@dataclass(frozen=True)
class Whole(Parallel):
    """Clients hold the whole model, step alone for `average_every` windows and send the change.

    With a server optimizer `nesterov` it is DiLoCo (Douillard et al. 2023); with Muon at the
    clients and two bits, MuLoCo (Thérien et al. 2025). Local moments are a client's own.
    """

    scopes: frozenset[Scope] = frozenset(get_args(Scope))
    trains_alone = True
    result_is_reference = True

    @property
    def sends_changes(self) -> bool:
        """Always: rows of the word table that no step has touched are left out of a change."""
        return True

    @property
    def keeps_rounding(self) -> bool:
        """Under every codec that rounds: it is all that a client and the server exchange."""
        return self.update_codec != "fp32"


def strategy_of(federation: FederationSection, wire: WireSection, cut: Cut = "embeddings") -> Strategy:
    """The strategy of a run file."""
    if cut == "whole":
        return Whole(wire.updates, federation.average_every)
    if federation.mode == "synchronous":
        # A step that waits for all updates would undo what staleness hides.
        return Synchronous(wire.updates, clips_together=federation.staleness == 0)
    scopes = federation.average_scope.split("+")
    return Parallel(wire.updates, federation.average_every, frozenset(s for s in get_args(Scope) if s in scopes))
