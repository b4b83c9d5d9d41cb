"""Who is late: every client's open questions, their clocks, and the answer times learned."""

from __future__ import annotations

import heapq
import math
import statistics
from collections import deque
from typing import NamedTuple

MEMORY = 64
"""Answers remembered of each client."""
FEW = 8
"""A client with fewer answers than this has no deadline yet."""
FLOOR_SECONDS = 30.0
"""No deadline is shorter: waiting for a stalled laptop costs less than a share of a window."""
SPREADS = 8.0
MULTIPLE = 4.0

LONGEST_ANSWER = 10.0
"""Times `silence_timeout` that one answer may take, however much of it comes meanwhile."""

SLOWEST_UPLOAD = 16_000.0
"""Bytes a second of a client update that buy its client more time."""

ANEW_SECONDS = 1.0
"""A clock is not set forward by less."""

FEW_AGES = 64
"""Clocks that are closed and not yet thrown away cost nothing, up to so many."""

ABOUT_A_PIECE = frozenset({"activations", "gradient"})
"""Kinds of questions that a window can go on without.

Their answer times are learned, and a client that is slow with them is suspended. Every other kind
is bounded by `silence_timeout` alone.
"""


class Question(NamedTuple):
    """What a client was asked for."""

    kind: str
    """`manifest`, `activations`, `gradient`, or any other answer that the rank waits for."""
    number: int = 0
    """The micro-batch or window it is about."""


class Late(NamedTuple):
    """A client that has kept the rank waiting for too long."""

    client: str
    is_gone: bool
    """Silent beyond `silence_timeout`; if false, slower than its own deadline for pieces."""


class AnswerTimes:
    """Seconds from question to answer, learned from each client's last answers.

    A client's deadline is `MULTIPLE` times (median + `SPREADS` x median absolute deviation), at
    least `floor` seconds. A tail of slow answers moves it far less than it would move a mean and a
    standard deviation.
    """

    def __init__(self, floor: float = FLOOR_SECONDS) -> None:
        self.floor = floor
        """Shortest deadline, seconds."""
        self._answers: dict[str, deque[float]] = {}
        self._by_kind: dict[str, dict[str, deque[float]]] = {}

    def learn(self, client: str, kind: str, seconds: float) -> None:
        """A client answered a question of this kind after so many seconds."""
        self._answers.setdefault(client, deque(maxlen=MEMORY)).append(seconds)
        self._by_kind.setdefault(kind, {}).setdefault(client, deque(maxlen=MEMORY)).append(seconds)

    def forget(self, client: str) -> None:
        """The client is gone; its answers say nothing about others."""
        self._answers.pop(client, None)
        for answers in self._by_kind.values():
            answers.pop(client, None)

    def deadline(self, client: str) -> float:
        """Seconds a client's answer may take; infinite while it gave fewer than `FEW` answers."""
        answers = self._answers.get(client, ())
        if len(answers) < FEW:
            return math.inf
        median = statistics.median(answers)
        spread = statistics.median(abs(seconds - median) for seconds in answers)
        return max(self.floor, MULTIPLE * (median + SPREADS * spread))

    def farthest(self, kind: str) -> float:
        """Seconds to the far clients: 90th percentile of each client's quickest answer; 0 if none.

        A client's quickest answer is its round trip and its work; slower ones waited behind others.
        """
        quickest = sorted(min(answers) for answers in self._by_kind.get(kind, {}).values())
        return quickest[9 * (len(quickest) - 1) // 10] if quickest else 0.0


class Deadlines:
    """Every open question: when it was asked, how long its clock has run, and which client is late.

    All times are seconds of the caller's clock. The clocks of questions stand still while the rank
    is busy (`stop_clocks`): it can neither ask nor listen then.
    """

    def __init__(self, silence_timeout: float = math.inf, answer_times: AnswerTimes | None = None) -> None:
        self.silence_timeout = silence_timeout
        """Seconds a question may stay open; its client is gone then."""
        self.is_hurried = False
        """`silence_timeout` is no longer the one that was set at first."""
        self.answer_times = answer_times
        """Where deadlines for pieces come from; without it no client is too slow."""
        self._open: dict[str, dict[Question, _Clock]] = {}
        self._by_age: list[tuple[float, str, Question]] = []
        """A heap of all clocks, the oldest first, and of some that have been closed."""
        self._most_ages = FEW_AGES
        """Then those that have been closed are thrown away."""
        self._old: set[str] = set()
        """Clients with a question older than any deadline may be: `late` looks at these only."""
        self._last_answer: dict[str, float] = {}
        """When each client last answered a question about a piece."""
        self._stopped = 0.0

    def stop_clocks(self, seconds: float) -> None:
        """The rank was busy for so long: no open question ages by that time."""
        self._stopped += seconds

    def ask(self, client: str, question: Question, now: float, is_due: bool = True) -> None:
        """Open a question; asked again, its clock starts anew.

        A question that is not due is open, but its clock stands until it is asked again: a client
        answers for the next window when it is done with the running one.
        """
        since = now - self._stopped if is_due else math.inf
        self._set_clock(client, question, _Clock(now, since, since))

    def progress(self, client: str, question: Question, now: float, seconds: float = math.inf) -> None:
        """Part of a long answer came, which deserves so many seconds more: its clock is set forward
        by them, to now at most.

        The whole answer takes `LONGEST_ANSWER` times `silence_timeout` at most.
        """
        clock = self._clock(client, question)
        if clock is None or clock.since == math.inf:
            return
        latest = min(now - self._stopped, clock.began + (LONGEST_ANSWER - 1) * self.silence_timeout)
        clock = clock._replace(earned=clock.earned + seconds)
        since = min(latest, clock.since + clock.earned)
        if since - clock.since >= ANEW_SECONDS:
            self._set_clock(client, question, clock._replace(since=since, earned=0.0))
        else:
            self._open[client][question] = clock

    def hurry(self, seconds: float, now: float) -> None:
        """From now on nobody may be silent for longer than so many seconds; those before do not
        count.
        """
        if self.is_hurried or seconds >= self.silence_timeout:
            return
        self.silence_timeout, self.is_hurried = seconds, True
        since = now - self._stopped
        for client, clocks in self._open.items():
            for question, clock in list(clocks.items()):
                if clock.since < math.inf:
                    self._set_clock(client, question, clock._replace(since=since, began=since))

    def answered(self, client: str, question: Question, now: float) -> None:
        """Close a question and learn from its answer time. Does nothing if it is not open."""
        clock = self._open.get(client, {}).pop(question, None)
        if clock is None or self.answer_times is None or question.kind not in ABOUT_A_PIECE:
            return
        self._last_answer[client] = now - self._stopped
        if clock.since < math.inf:
            self.answer_times.learn(client, question.kind, now - clock.asked)

    def cancel(self, client: str, question: Question) -> None:
        """Close a question whose answer is no longer wanted."""
        self._open.get(client, {}).pop(question, None)

    def asked_at(self, client: str, question: Question) -> float | None:
        """When an open question was asked; None if it is not open."""
        clock = self._clock(client, question)
        return None if clock is None else clock.asked

    def suspend(self, client: str, question: Question) -> None:
        """Cancel a client's questions about pieces and ask this one instead.

        It counts as open since the client's oldest question, so its silence goes on.
        """
        clocks = self._open.get(client, {})
        oldest = min((clock.since for clock in clocks.values()), default=math.inf)
        self._open[client] = {asked: clock for asked, clock in clocks.items() if asked.kind not in ABOUT_A_PIECE}
        self._set_clock(client, question, _Clock(oldest + self._stopped, oldest, oldest))

    def close_all(self, client: str) -> None:
        """Close every question to a client: no answer is wanted any more."""
        self._open.pop(client, None)

    def forget(self, client: str) -> None:
        """The client is gone: close its questions, drop what was learned of it."""
        self.close_all(client)
        self._old.discard(client)
        self._last_answer.pop(client, None)
        if self.answer_times is not None:
            self.answer_times.forget(client)

    def late(self, now: float) -> Late | None:
        """The first late client by name, or None. The caller must `forget` or `suspend` it."""
        now -= self._stopped
        # No learned deadline is shorter than the floor: a younger question makes nobody late.
        shortest = min(self.silence_timeout, self.answer_times.floor if self.answer_times else math.inf)
        while self._by_age and now - self._by_age[0][0] > shortest:
            since, client, question = heapq.heappop(self._by_age)
            clock = self._clock(client, question)
            if clock is not None and clock.since == since:
                self._old.add(client)
        for client in sorted(self._old):
            waited = now - min((clock.since for clock in self._open.get(client, {}).values()), default=math.inf)
            if waited <= shortest:
                self._old.discard(client)
            elif waited > self.silence_timeout:
                return Late(client, is_gone=True)
            elif self._is_slow(client, now):
                return Late(client, is_gone=False)
        return None

    def _is_slow(self, client: str, now: float) -> bool:
        if self.answer_times is None:
            return False
        clocks = self._open[client].items()
        oldest = min((clock.since for asked, clock in clocks if asked.kind in ABOUT_A_PIECE), default=math.inf)
        # Answers come one after another: a client is slow once none at all came for a while.
        silent_since = max(oldest, self._last_answer.get(client, -math.inf))
        return now - silent_since > self.answer_times.deadline(client)

    def _clock(self, client: str, question: Question) -> _Clock | None:
        return self._open.get(client, {}).get(question)

    def _set_clock(self, client: str, question: Question, clock: _Clock) -> None:
        self._open.setdefault(client, {})[question] = clock
        if clock.since < math.inf:
            heapq.heappush(self._by_age, (clock.since, client, question))
            if len(self._by_age) > self._most_ages:
                self._throw_away()

    def _throw_away(self) -> None:
        # Questions are closed long before anybody is late: most of the heap is of those.
        clocks = [(client, *item) for client, clocks in self._open.items() for item in clocks.items()]
        self._by_age = [(clock.since, client, asked) for client, asked, clock in clocks if clock.since < math.inf]
        heapq.heapify(self._by_age)
        self._most_ages = max(FEW_AGES, 2 * len(self._by_age))


class _Clock(NamedTuple):
    """The two times of an open question."""

    asked: float
    """By the caller's clock."""
    since: float
    """By the clock that stands still while the rank is busy, and that progress sets forward;
    infinite if not due yet.
    """
    began: float
    """As `since` was at first."""
    earned: float = 0.0
    """Seconds of progress that it was not set forward by yet."""
