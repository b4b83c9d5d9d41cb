"""A federation without tensors, network or threads: queues of several ranks, their clients and
their collectives.

`Federation` plays both the ranks' loop and the clients. A `choose` function says which of the
possible things happens next, so that any order of arrivals can be played. An oracle checks every
decision of every rank.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from unit.server.queue.oracle import Kind, Oracle, Rules

from fedbert_ds.server.queue.deadlines import AnswerTimes, Deadlines
from fedbert_ds.server.queue.decisions import Decision, Expire, Plan, Suspend
from fedbert_ds.server.queue.in_flight import InFlightLimits
from fedbert_ds.server.queue.packing import pack
from fedbert_ds.server.queue.pipeline_queue import PipelineQueue
from fedbert_ds.wire.messages import Manifest

Choose = Callable[[Sequence[Any]], Any]


class FixedAnswerTimes(AnswerTimes):
    """The same deadline for everybody, the floor."""

    def learn(self, client: str, kind: str, seconds: float) -> None:
        assert 0.0 <= seconds < math.inf

    def deadline(self, client: str) -> float:
        return self.floor


class Rank:
    """One rank: its queue, the oracle beside it, and the collectives it issued."""

    def __init__(self, rules: Rules, lockstep_forwards: bool) -> None:
        answer_times = FixedAnswerTimes(rules.deadline) if rules.deadline < math.inf else None
        self.queue = PipelineQueue(
            rules.in_flight,
            partial(pack, capacity=rules.capacity),
            rules.order,
            lockstep_forwards,
            num_windows=rules.num_windows,
            windows_ahead=rules.windows_ahead,
            deadlines=Deadlines(rules.silence_timeout, answer_times),
            takes_part=rules.takes_part,
        )
        self.oracle = Oracle(rules)
        self.mute: dict[str, str | None] = {}
        """`activations` or `gradient`: what a client never sends."""
        self.collectives: list[str] = []
        """Kinds of operations in which all ranks must take part, as this rank issued them."""
        self.is_blocked = False

    def hear(self, name: str, now: float) -> None:
        """A message of a client came, whichever."""
        self.queue.reactivate(name, now)
        self.oracle.hear(name, now)
        assert self.queue.active == self.oracle.active

    def start(self, num_micro_batches: int, elsewhere: frozenset[str], now: float) -> None:
        """The planned window runs."""
        schedule, in_flight = self.queue.schedule, self.oracle.rules.in_flight
        assert schedule.num_micro_batches == len(self.oracle.windows[0].micro_batches)
        assert schedule.masked_tokens == self.oracle.masked_tokens()
        expected = self.oracle.start(num_micro_batches, elsewhere, now)
        limits = InFlightLimits(in_flight, in_flight)
        assert self.queue.start(num_micro_batches, now, limits, elsewhere) == expected

    def decide(self, now: float) -> Decision | None:
        """One decision of the queue, compared with what may be decided."""
        self.oracle.look(now)
        decision = self.queue.decide(now)
        self.oracle.check(decision, now)
        if isinstance(decision, Plan):
            assert self.queue.next_window == self.oracle.next_window
        elif isinstance(decision, Suspend):
            assert decision.client not in self.queue.active and decision.client in self.queue.clients
        return decision


class Federation:
    """Ranks, clients, a clock; `possible` lists what may happen next and `do` makes one of these
    happen.
    """

    def __init__(
        self,
        *,
        num_ranks: int,
        lockstep_forwards: bool = False,
        staleness: int = 0,
        is_synchronous: bool = True,
        **rules: Any,
    ) -> None:
        self.rules = Rules(**rules)
        self.staleness = staleness
        self.is_synchronous = is_synchronous
        self.now = 0.0
        self.ranks = [Rank(self.rules, lockstep_forwards) for _ in range(num_ranks)]
        self.collective_kinds = {"Gather", "Backward", "Step"}
        if lockstep_forwards or self.rules.order == "fixed":
            self.collective_kinds.add("Forward")
        self.finished = 0
        self.expired: list[str] = []
        self.suspended: list[str] = []

    # -- what a client does ------------------------------------------------------------------------

    def join(self, rank: int, name: str, mute: str | None = None, is_awaited: bool = True) -> None:
        here = self.ranks[rank]
        here.queue.join(name, self.now, is_awaited)
        here.oracle.join(name, self.now, is_awaited)
        here.mute[name] = mute

    def lose(self, rank: int, name: str) -> None:
        here = self.ranks[rank]
        here.queue.lose(name)
        here.oracle.lose(name)

    def send_manifest(self, rank: int, name: str) -> None:
        here = self.ranks[rank]
        window = here.oracle.clients[name].may_announce
        assert window is not None
        here.hear(name, self.now)
        manifest = Manifest(name, window, *self.rules.lengths(name, window))
        is_taken = here.queue.manifest(manifest)
        assert is_taken == here.oracle.announce(manifest), "only what comes too late is not taken"

    def send(self, rank: int, name: str, kind: Kind, index: int) -> None:
        here = self.ranks[rank]
        here.hear(name, self.now)
        expected = here.oracle.answer(name, kind, index)
        assert not here.queue.was_skipped(name, index)
        assert here.queue.expected_piece(name, index, kind) == expected
        assert here.queue.answer(name, index, kind) == expected

    def send_late(self, rank: int, name: str) -> None:
        """An answer for a skipped piece is not wanted, but shows that its client is there."""
        here = self.ranks[rank]
        _, index = here.oracle.clients[name].skipped.pop(0)
        here.hear(name, self.now)
        assert here.queue.was_skipped(name, index)

    def _may_send(self, rank: Rank, name: str, kind: str, index: int) -> bool:
        """Activations wait until the client model has taken the steps of earlier windows."""
        if rank.mute[name] == kind:
            return False
        if kind == "gradient":
            return True
        before = rank.oracle.find(index)[0].number - self.staleness
        if self.is_synchronous:
            return self.finished >= before
        earlier = (window for window in rank.oracle.windows if window.number < before)
        return not any(entry.waits_for(name) for window in earlier for entry in window.micro_batches.values())

    # -- what ranks do -----------------------------------------------------------------------------

    def gather(self, rank: int) -> None:
        """This rank's next window is planned, and it tells the others; all of them start it
        together.
        """
        here = self.ranks[rank]
        assert here.queue.schedule.is_planned and not here.oracle.is_running
        self._issue(here, "Gather")

    def roll_back(self, window: int) -> None:
        """All ranks undo the windows from `window` on, and their clients hear of it."""
        assert window <= self.finished
        self.finished = window
        for rank in self.ranks:
            rank.queue.roll_back(window, self.now)
            rank.oracle.roll_back(window, self.now)
            rank.collectives.clear()
            rank.is_blocked = False

    def hold(self, is_held: bool) -> None:
        """No rank plans a window meanwhile."""
        for rank in self.ranks:
            rank.queue.hold(is_held)
            rank.oracle.is_held = is_held

    def decide(self, rank: int) -> Decision | None:
        """One decision of a rank."""
        here = self.ranks[rank]
        assert not here.is_blocked
        decision = here.decide(self.now)
        if isinstance(decision, Expire):
            self.expired.append(decision.client)
        elif isinstance(decision, Suspend):
            self.suspended.append(decision.client)
        if (kind := type(decision).__name__) in self.collective_kinds:
            self._issue(here, kind)
        return decision

    def _issue(self, rank: Rank, kind: str) -> None:
        """An operation of all ranks ends when the last of them has issued it; all must have issued
        the same.
        """
        rank.collectives.append(kind)
        rank.is_blocked = True
        place = len(rank.collectives) - 1
        issued = [each.collectives[place] for each in self.ranks if len(each.collectives) > place]
        assert len(set(issued)) == 1, f"operation {place} differs between ranks: {issued}"
        if len(issued) < len(self.ranks):
            return
        for each in self.ranks:
            each.is_blocked = False
        if kind == "Step":
            self.finished += 1
        if kind == "Gather":
            counts = [each.queue.schedule.num_micro_batches for each in self.ranks]
            active = [each.queue.active for each in self.ranks]
            for number, each in enumerate(self.ranks):
                elsewhere = frozenset().union(*active[:number], *active[number + 1 :])
                each.start(max(1, *counts), elsewhere, self.now)

    # -- what may happen ---------------------------------------------------------------------------

    def possible(self) -> list[tuple[Any, ...]]:
        """Arrivals and steps of ranks; each is a method's name and its arguments."""
        actions: list[tuple[Any, ...]] = []
        for number, rank in enumerate(self.ranks):
            for name, client in rank.oracle.clients.items():
                if client.may_announce is not None and not client.skipped:
                    actions.append(("send_manifest", number, name))
                actions += [
                    ("send", number, name, *what) for what in client.owed_pieces if self._may_send(rank, name, *what)
                ]
                if client.skipped and client.skipped[0][0] != rank.mute[name]:
                    actions.append(("send_late", number, name))
            if rank.queue.schedule.is_planned and not rank.is_blocked:
                actions.append(("gather", number))
        return actions

    def do(self, action: tuple[Any, ...]) -> Any:
        return getattr(self, action[0])(*action[1:])

    def decide_all(self) -> bool:
        """Let ranks decide until all of them wait; says whether any decided anything."""
        decided = False
        while any([not rank.is_blocked and self.decide(number) for number, rank in enumerate(self.ranks)]):
            decided = True
        return decided

    def run(self, windows: int, choose: Choose = lambda options: options[0]) -> None:
        """Go on until so many windows are finished; an AssertionError when nothing can happen
        before that.
        """
        jumps = 0
        while self.finished < windows:
            if self.decide_all():
                jumps = 0
            elif actions := self.possible():
                self.do(choose(actions))
            else:
                shortest = min(self.rules.deadline, self.rules.silence_timeout)
                assert shortest < math.inf and jumps < 10, "deadlock: nothing can happen and no rank can go on"
                self.now += shortest + 0.5
                jumps += 1


def queue_state(queue: PipelineQueue) -> bytes:
    """All that a queue holds, to be compared with itself later."""
    return pickle.dumps(queue)
