"""The rules of each federated mode, pure; clients, server and planner ask the same object.

A strategy says who takes part in a window (`sampler`), what these clients send after it, how it is
combined and what all clients do with that:

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

from fedbert_ds.config import Cut, FederationSection, RunConfig, UpdateCodec, WireSection
from fedbert_ds.federation.sampler import Everybody, Members, Sample, Sampler, Turns

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

    def sampler(self, seed: int, members: Members) -> Sampler:
        """Who of `members` takes part in each window of a run with this seed."""

    def num_participants(self, members: int) -> int:
        """How many of so many members take part in a window."""

    def exchange_after(self, window: int) -> Exchange:
        """What the participants of window `window` (0-based) send after it.

        Every client gets it back combined, participant or not.
        """

    def takes_part(self, scope: Scope) -> bool:
        """Parameters of this scope are exchanged; all others stay personal to their client."""

    @property
    def halves_are_personal(self) -> bool:
        """A client's half holds what the reference does not: personal parts, moments of its own.

        Then clients save their state themselves. Otherwise every half is the reference, which the
        aggregator has.
        """

    @property
    def least_weight(self) -> int:
        """Fewest masked tokens an update counts for: 0 where a window without any is no step."""

    @property
    def result_is_reference(self) -> bool:
        """The run's result is the reference; otherwise the average of what all clients hand over
        of their halves, and the reference for the rest.
        """

    def is_handed_over(self, scope: Scope) -> bool:
        """Clients hand parameters of this scope over for the result; others never leave them."""

    @property
    def has_kept_parts(self) -> bool:
        """Some parameters never leave their clients. The result has them as the run began."""


@dataclass(frozen=True)
class Synchronous:
    """Gradients are summed every window: each client takes the step of centralized training."""

    update_codec: UpdateCodec
    clips_together: bool = True
    participants: int | None = None
    """How many clients take part in a window; None: all."""
    sends_changes = False
    keeps_rounding = False
    trains_alone = False
    halves_are_personal = False
    result_is_reference = True
    has_kept_parts = False
    needs_every_window = True
    least_weight = 0
    exchanges_per_window = 1.0

    def sampler(self, seed: int, members: Members) -> Sampler:
        """All, or a sample of each window."""
        return _all_or_some(seed, members, 1, self.participants)

    def num_participants(self, members: int) -> int:
        """All, or as many as the run file says."""
        return members if self.participants is None else min(self.participants, members)

    def exchange_after(self, window: int) -> Exchange:
        """Gradients, every window."""
        return "gradients"

    def takes_part(self, scope: Scope) -> bool:
        """Everything: there is one model."""
        return True

    def is_handed_over(self, scope: Scope) -> bool:
        """Nothing: the reference has it."""
        return False


@dataclass(frozen=True)
class Parallel:
    """Clients step alone; weights are averaged every `average_every` windows, a round.

    FedAvg, McMahan et al. 2017. Whoever takes part takes part in all windows of a round, so that
    it begins with the average and its weights are in the next one.
    """

    update_codec: UpdateCodec
    average_every: int
    scopes: frozenset[Scope]
    """Parts of the client half that are averaged."""
    participants: int | None = None
    """How many clients take part in a round; None: all."""
    hands_over_personal_parts: bool = False
    trains_alone = False
    halves_are_personal = True
    result_is_reference = False
    needs_every_window = False
    least_weight = 1
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

    def sampler(self, seed: int, members: Members) -> Sampler:
        """All, or a sample of each round."""
        return _all_or_some(seed, members, self.average_every, self.participants)

    def num_participants(self, members: int) -> int:
        """All, or as many as the run file says."""
        return members if self.participants is None else min(self.participants, members)

    def exchange_after(self, window: int) -> Exchange:
        """Weights, after the last of every `average_every` windows."""
        return "weights" if (window + 1) % self.average_every == 0 else "nothing"

    def takes_part(self, scope: Scope) -> bool:
        """The parts that the run file averages."""
        return scope in self.scopes

    def is_handed_over(self, scope: Scope) -> bool:
        """What is averaged anyway, which may have moved since; the rest if the run file says so."""
        return not self.result_is_reference and (self.takes_part(scope) or self.hands_over_personal_parts)

    @property
    def has_kept_parts(self) -> bool:
        """What is neither averaged nor handed over."""
        return not all(self.takes_part(scope) or self.is_handed_over(scope) for scope in get_args(Scope))


@dataclass(frozen=True)
class Sequential(Parallel):
    """One client at a time trains for a turn of `average_every` windows; its weights become the
    reference, with which the next client goes on.

    The "share" of FedBERT (Tian et al. 2022). The average of one client's weights is these weights,
    so a turn is a round of `Parallel` with one participant, in the order of names; nothing is
    personal but each client's optimizer moments, which wait for its next turn.
    """

    result_is_reference = True

    def sampler(self, seed: int, members: Members) -> Sampler:
        """Each member in turn; the seed has no part in it."""
        return Turns(members, self.average_every)

    def num_participants(self, members: int) -> int:
        """One."""
        return min(1, members)


@dataclass(frozen=True)
class Whole(Parallel):
    """Clients hold the whole model, step alone for `average_every` windows and send the change.

    With a server optimizer `nesterov` it is DiLoCo (Douillard et al. 2023); with Muon at the
    clients and two bits, MuLoCo (Thérien et al. 2025). Local moments are a client's own.
    """

    scopes: frozenset[Scope] = frozenset(get_args(Scope))
    trains_alone = True
    least_weight = 0
    result_is_reference = True

    @property
    def sends_changes(self) -> bool:
        """Always: rows of the word table that no step has touched are left out of a change."""
        return True

    @property
    def keeps_rounding(self) -> bool:
        """Under every codec that rounds: it is all that a client and the server exchange."""
        return self.update_codec != "fp32"


def strategy_of_run(config: RunConfig) -> Strategy:
    """The strategy of a run file."""
    return strategy_of(config.federation, config.wire, config.cut)


def strategy_of(federation: FederationSection, wire: WireSection, cut: Cut = "embeddings") -> Strategy:
    """The strategy that these sections of a run file ask for."""
    count = None if federation.participants == "all" else federation.participants
    if cut == "whole":
        return Whole(wire.updates, federation.average_every, participants=count)
    if federation.mode == "synchronous":
        # A step that waits for all updates would undo what staleness hides.
        return Synchronous(wire.updates, federation.staleness == 0, count)
    if federation.mode == "sequential":
        return Sequential(wire.updates, federation.average_every, frozenset(get_args(Scope)))
    scopes = federation.average_scope.split("+")
    averaged = frozenset(s for s in get_args(Scope) if s in scopes)
    return Parallel(wire.updates, federation.average_every, averaged, count, federation.personal_parts == "averaged")


def _all_or_some(seed: int, members: Members, round_windows: int, count: int | None) -> Sampler:
    return Everybody(members, round_windows) if count is None else Sample(members, round_windows, count, seed)
