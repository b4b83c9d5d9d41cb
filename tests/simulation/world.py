"""Virtual time: events in order of time, and ranks as threads of which one at a time runs.

A rank runs until it waits. Whoever waits looks for what happens next: a rank that may go on, or the
next event, for which the clock jumps ahead. Chance decides only where two ranks may go on at the
same time, so a seed is a schedule.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
import threading
from collections.abc import Callable

MOST_EVENTS = 60_000
"""Of a schedule. One that has more does not come to an end."""
MOST_IDLE = 5_000
"""Polls of ranks in a row, without an event between them."""


class Killed(BaseException):
    """Raised inside a rank that is killed, wherever it waits."""


class Endless(AssertionError):
    """A schedule does not come to its end, or nothing can happen any more."""


class Task:
    """A thread that runs while it holds the baton."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.baton = threading.Lock()
        """Who holds it runs: `acquire` waits for it, another one's `release` hands it over."""
        self.baton.acquire()
        self.may_go_on: Callable[[], bool] = lambda: True
        self.wakes_at = math.inf
        self.is_killed = self.is_over = False


class World:
    """The clock, the events to come and the ranks."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.num_events = 0
        self.error: BaseException | None = None
        """The first thing that went wrong, anywhere."""
        self._count = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._tasks: list[Task] = []
        self._main = Task("main")
        self._idle = 0

    def after(self, seconds: float, do: Callable[[], None]) -> None:
        """Something happens so many seconds from now."""
        self.at(self.now + seconds, do)

    def at(self, time: float, do: Callable[[], None]) -> None:
        """Something happens at this time, after what was planned for it before."""
        heapq.heappush(self._events, (time, next(self._count), do))

    def start(self, name: str, run: Callable[[Task], None]) -> Task:
        """A rank begins; `run` is called in its thread."""
        task = Task(name)

        def in_thread() -> None:
            task.baton.acquire()
            try:
                if not task.is_killed:
                    run(task)
            except Killed:
                pass
            except BaseException as error:
                self.fail(error)
            task.is_over = True
            self._tasks.remove(task)
            self._next().baton.release()

        self._tasks.append(task)
        threading.Thread(target=in_thread, name=name, daemon=True).start()
        return task

    def wait(self, task: Task, may_go_on: Callable[[], bool], seconds: float = math.inf) -> None:
        """The running task waits until it may go on, or for so long. Killed if it is killed."""
        if task.is_killed:
            raise Killed
        task.may_go_on, task.wakes_at = may_go_on, self.now + seconds
        following = self._next()
        if following is not task:
            following.baton.release()
            task.baton.acquire()
        if task.is_killed:
            raise Killed

    def run(self, is_over: Callable[[], bool]) -> None:
        """Let things happen until it is over and no rank is left; raises what went wrong."""
        self._main.may_go_on = lambda: not self._tasks and (self.error is not None or is_over())
        self._main.wakes_at = math.inf
        following = self._next()
        if following is not self._main:
            following.baton.release()
            self._main.baton.acquire()
        if self.error is not None:
            raise self.error

    def settle(self) -> None:
        """Let the events that are left happen, once no rank runs."""
        while self._events and self.error is None:
            self._happen()
        if self.error is not None:
            raise self.error

    def kill(self, task: Task) -> None:
        """It ends where it waits."""
        task.is_killed = True

    def fail(self, error: BaseException) -> None:
        """Something went wrong: every rank ends."""
        self.error = self.error or error
        for task in self._tasks:
            task.is_killed = True

    def _next(self) -> Task:
        """The task that runs next; events happen until there is one."""
        while True:
            ready = [task for task in self._tasks if task.is_killed or task.may_go_on()]
            if ready:
                self._idle = 0
                return ready[0] if len(ready) == 1 else self.random.choice(ready)
            if self._main.may_go_on():
                return self._main
            first = min(self._tasks, key=lambda task: task.wakes_at, default=self._main)
            if self._events and self._events[0][0] <= first.wakes_at:
                self._happen()
                continue
            self._idle += 1
            if first.wakes_at == math.inf or self._idle > MOST_IDLE:
                self.fail(Endless(f"nothing happens any more after {self.now:.1f} s"))
                if not self._tasks:
                    return self._main
                continue
            self.now = first.wakes_at
            return first

    def _happen(self) -> None:
        time, _, do = heapq.heappop(self._events)
        self.now, self._idle = max(self.now, time), 0
        self.num_events += 1
        try:
            if self.num_events > MOST_EVENTS:
                raise Endless(f"more than {MOST_EVENTS} events")
            do()
        except BaseException as error:
            self.fail(error)
