"""Whose turn it is: the micro-batch that gets credit next, and the one that the body computes next.

Pure functions of windows and limits. The plan's order or the older answer breaks every tie.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from itertools import chain, islice

from fedbert_ds.server.queue.decisions import Backward, Forward
from fedbert_ds.server.queue.in_flight import InFlightLimits
from fedbert_ds.server.queue.schedule import PlannedMicroBatch, State, Window

Operation = type[Forward] | type[Backward]


# -- credit ----------------------------------------------------------------------------------------


def next_to_open(
    windows: Collection[Window], limits: InFlightLimits, is_fixed: bool
) -> tuple[Window, PlannedMicroBatch] | None:
    """The micro-batch that gets credit next, and its window; None if no more credit is due now.

    A window gets all its credit before the next one gets any. Clients answer for the next window
    when they are done with this one, so the next window must never hold the places that this one
    needs.
    """
    window = next((window for window in windows if window.wants_credit), None)
    if window is None:
        return None
    live = [micro_batch for each in windows for micro_batch in each.live.values()]
    is_full = sum(micro_batch.holds_memory for micro_batch in live) >= sum(limits)
    if is_full and not window.empty:
        return None
    micro_batch = _first_in_plan(window) if is_fixed else _first_fair(window, live, limits)
    if micro_batch is None:
        return None
    if not micro_batch.pieces:
        # It holds no memory and takes none of those places: each window has as many for dummies.
        is_full = sum(not other.holds_memory for other in window.live.values()) >= sum(limits)
    return None if is_full else (window, micro_batch)


def _first_in_plan(window: Window) -> PlannedMicroBatch | None:
    with_pieces = [micro_batches[0] for micro_batches in islice(window.planned.values(), 1)]
    return min([*with_pieces, *window.empty], key=lambda micro_batch: micro_batch.index, default=None)


def _first_fair(
    window: Window, live: Collection[PlannedMicroBatch], limits: InFlightLimits
) -> PlannedMicroBatch | None:
    """The first whose clients all hold less than a fair share of credit, else one without pieces.

    In the order of the plan clients finish the window one after another and go on to the next one.
    The fair share keeps one slow client from holding all credit.
    """
    share = fair_share(limits, len(window.planned_of))
    taken = credit_taken(live)
    for client, micro_batches in window.planned.items():
        for micro_batch in micro_batches:
            if all(taken[other] < share for other in micro_batch.pieces):
                return micro_batch
            if client in micro_batch.pieces and taken[client] >= share:
                break
    return min(window.empty, key=lambda micro_batch: micro_batch.index, default=None)


def fair_share(limits: InFlightLimits, num_clients: int) -> int:
    """Most micro-batches of one client that hold credit, when so many clients want some."""
    return -(-sum(limits) // max(1, num_clients))


def credit_taken(live: Collection[PlannedMicroBatch]) -> Counter[str]:
    """Credit each client holds: answers it owes; if any, also activations that are READY."""
    taken = Counter(client for micro_batch in live for client in micro_batch.awaited)
    ready = [micro_batch for micro_batch in live if micro_batch.state is State.READY]
    taken.update([client for micro_batch in ready for client in micro_batch.pieces if client in taken])
    return taken


# -- computing -------------------------------------------------------------------------------------


def next_to_compute(window: Window, limit: int, is_fixed: bool, due: Operation | None) -> PlannedMicroBatch | None:
    """The READY or GRADIENTS_READY micro-batch that the body computes next; None if it must wait.

    Forwards go first while there is room. The gradients that come back meanwhile make a stock of
    work that covers the round trip after the window's last forward. Dummies only fill waiting time.
    With lockstep, only the operation that is `due` may go. At most `limit` are in flight.
    """
    if due is None:
        candidates = [next_forward(window, limit), next_backward(window, is_fixed)]
    elif due is Forward:
        candidates = [next_lockstep_forward(window, is_fixed)]
    else:
        candidates = [next_backward(window, is_fixed)]
    ready = [micro_batch for micro_batch in candidates if micro_batch is not None]
    return min(ready, key=lambda micro_batch: micro_batch.is_dummy, default=None)


def next_forward(window: Window, limit: int) -> PlannedMicroBatch | None:
    """The oldest READY one, if `limit` allows; the last place in flight is not for `blockers`."""
    in_flight = window.in_flight
    if len(in_flight) >= limit:
        return None
    ready = _in_state(window, State.READY)
    blocking = blockers(in_flight) if len(in_flight) == limit - 1 else set()
    if blocking and _others_wait(window, blocking):
        ready = [micro_batch for micro_batch in ready if not blocking & micro_batch.pieces.keys()]
    return _oldest(ready)


def next_lockstep_forward(window: Window, is_fixed: bool) -> PlannedMicroBatch | None:
    """The oldest READY one; in a fixed order the plan's next one, once it is READY."""
    if is_fixed:
        return _first_opened(window, State.OPEN, State.READY)
    return _oldest(_in_state(window, State.READY))


def next_backward(window: Window, is_fixed: bool) -> PlannedMicroBatch | None:
    """The oldest GRADIENTS_READY one; in a fixed order the first forwarded, once it is."""
    if is_fixed:
        return _first_opened(window, State.FORWARDED, State.GRADIENTS_READY)
    return _oldest(_in_state(window, State.GRADIENTS_READY))


def blockers(in_flight: Sequence[PlannedMicroBatch]) -> set[str]:
    """Clients whose gradient every micro-batch in flight waits for.

    One more of theirs in flight would stop the body until they answer.
    """
    return set.intersection(*(micro_batch.awaited for micro_batch in in_flight)) if in_flight else set()


def lockstep_pattern(num_micro_batches: int, in_flight: int) -> list[Operation]:
    """One order of operations for all ranks: fill to `in_flight`, then backward and forward."""
    fill = min(in_flight, num_micro_batches)
    steady: list[Operation] = [Backward, Forward] * (num_micro_batches - fill)
    return [Forward] * fill + steady + [Backward] * fill


def _others_wait(window: Window, blocking: set[str]) -> bool:
    """Some micro-batch that is not forwarded yet has pieces, and none of them is a blocker's."""
    opened = (micro_batch for micro_batch in window.live.values() if micro_batch.state < State.FORWARDED)
    waiting = chain(opened, chain.from_iterable(window.planned.values()))
    return any(micro_batch.pieces and not blocking & micro_batch.pieces.keys() for micro_batch in waiting)


def _in_state(window: Window, state: State) -> list[PlannedMicroBatch]:
    return [micro_batch for micro_batch in window.live.values() if micro_batch.state is state]


def _oldest(ready: Iterable[PlannedMicroBatch]) -> PlannedMicroBatch | None:
    return min(ready, key=lambda micro_batch: (micro_batch.is_dummy, micro_batch.turn), default=None)


def _first_opened(window: Window, before: State, ready: State) -> PlannedMicroBatch | None:
    """The first opened of those in the two states, if it is `ready`: nothing overtakes it."""
    first = next((micro_batch for micro_batch in window.live.values() if micro_batch.state in (before, ready)), None)
    return first if first is not None and first.state is ready else None
