"""Deliberate faults in the rooms that schedules play. The simulation must find each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from simulation.draw import Schedule

from fedbert_ds.server.admission import Members
from fedbert_ds.server.client_service import ClientService
from fedbert_ds.server.cursors import Cursors
from fedbert_ds.server.network.sessions import Sessions
from fedbert_ds.server.queue.decisions import Plan
from fedbert_ds.server.queue.schedule import Window
from fedbert_ds.server.rank import RankServer
from fedbert_ds.wire.conversation import Conversation

Patches = list[tuple[object, str, object]]


def _any(schedule: Schedule) -> bool:
    return True


def _loses_clients(schedule: Schedule) -> bool:
    return not schedule.waits and any(fault.kind in ("kill client", "cut") for fault in schedule.faults)


def _takes_turns(schedule: Schedule) -> bool:
    has_newcomers = len(schedule.clients) > schedule.num_first
    takes_turns = schedule.mode == "sequential" or schedule.config.federation.participants != "all"
    return has_newcomers and takes_turns


@contextmanager
def applied(name: str) -> Iterator[None]:
    """Run with one fault."""
    with ExitStack() as patches:
        for target, attribute, replacement in FAULTS[name]:
            patches.enter_context(mock.patch.object(target, attribute, replacement))
        yield


_forget, _roll_back_cursors = Cursors.forget, Cursors.roll_back
_roll_back_service, _drop = ClientService.roll_back, Window.drop
_take = Conversation.take


def _keeps_later_cursors(self: Any, committed: Any = None) -> None:
    _roll_back_cursors(self)


def _forgets_what_is_trained(self: Any, client: str, counts: int | None = None) -> None:
    _forget(self, client)


def _keeps_held_updates(self: Any, window: int) -> None:
    held, norms = dict(self._held), dict(self.norms)
    _roll_back_service(self, window)
    self._held.update(held)
    self.norms.update(norms)


def _believes_old_messages(self: Any, window: int) -> None:
    _roll_back_service(self, window)
    self._rolled_back.clear()


def _awaits_who_is_gone(self: Any, micro_batch: Any, client: str) -> Any:
    is_awaited = client in micro_batch.awaited
    piece = _drop(self, micro_batch, client)
    if is_awaited and piece is not None:
        micro_batch.awaited.add(client)
    return piece


def _takes_twice(self: Any, delivery: Any, num_bytes: int) -> bool:
    is_new = _take(self, delivery, num_bytes)
    return is_new or 0 < delivery.sequence <= self.received


def _admits_at_once(self: Any, seats: Any, first_window: int) -> None:
    for client in sorted(seats.keys() - self.seats.keys()):
        self.sampler.admit(client, first_window)
    self.seats.update(seats)
    self.tokens.update({client: seat.tokens for client, seat in seats.items()})


NEEDS: dict[str, Callable[[Schedule], bool]] = {
    "a lost client's trained text is announced again": lambda schedule: (
        schedule.mode != "whole" and _loses_clients(schedule)
    ),
    "a newcomer gets a turn that another was told": _takes_turns,
    "what an earlier process announced is asked of the next": lambda schedule: (
        schedule.mode == "whole" and _loses_clients(schedule)
    ),
}
"""Schedules that a fault can show in, where these are few."""


SEEDS = {"what an earlier process left behind is heard": 74065}
"""A schedule that shows a fault, where one in some ten thousands does."""


def may_show(name: str, schedule: Schedule) -> bool:
    """Whether a fault can show in this schedule."""
    return NEEDS.get(name, _any)(schedule)


FAULTS: dict[str, Patches] = {
    "a checkpoint's cursors are not taken over": [(Cursors, "roll_back", _keeps_later_cursors)],
    "a lost client's trained text is announced again": [(Cursors, "forget", _forgets_what_is_trained)],
    "an update of a window that was undone is kept": [(ClientService, "roll_back", _keeps_held_updates)],
    "messages from before a roll-back are believed": [(ClientService, "roll_back", _believes_old_messages)],
    "a lost client's piece is awaited": [(Window, "drop", _awaits_who_is_gone)],
    "a window without a lost client counts": [(RankServer, "_is_broken", lambda self: False)],
    "a save does not wait for updates": [(ClientService, "finish_exchanges", lambda self: None)],
    "a message counts each time that it comes": [(Conversation, "take", _takes_twice)],
    "a newcomer gets a turn that another was told": [(Members, "admit", _admits_at_once)],
    "what an earlier process announced is asked of the next": [(Plan, "without", lambda self, _: self)],
    "what an earlier process left behind is heard": [(Sessions, "heard", lambda self, take_event: take_event)],
}
