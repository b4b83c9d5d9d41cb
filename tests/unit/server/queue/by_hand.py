"""Small queues by hand: windows that are packed as a test says, and decisions as short words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from fedbert_ds.server.queue.decisions import Backward, Expire, Forward, Open, Plan, Step, Suspend
from fedbert_ds.server.queue.packing import Piece
from fedbert_ds.server.queue.pipeline_queue import PipelineQueue
from fedbert_ds.server.queue.schedule import PlannedMicroBatch, Schedule, State
from fedbert_ds.wire.messages import Manifest


def pieces(*clients: str) -> tuple[Piece, ...]:
    return tuple(Piece(client, 0, 1, tokens=4, masked=2) for client in clients)


def queue_of(in_flight: int, plans: Sequence[Sequence[tuple[Piece, ...]]], **options: Any) -> PipelineQueue:
    """A queue that packs windows like this, whatever is in the manifests of those who are there."""
    remaining = iter(plans)

    def pack(manifests: Sequence[Manifest]) -> list[tuple[Piece, ...]]:
        here = {manifest.client for manifest in manifests}
        kept = [tuple(piece for piece in micro_batch if piece.client in here) for micro_batch in next(remaining)]
        return [micro_batch for micro_batch in kept if micro_batch]

    return PipelineQueue(in_flight, pack, **{"num_windows": len(plans), **options})


def announce(queue: PipelineQueue, *clients: str) -> None:
    for client in clients:
        queue.manifest(Manifest(client, queue.roster.next_window, (4,), (2,)))


def started(
    in_flight: int,
    plan: Sequence[tuple[Piece, ...]],
    order: Literal["arrival", "fixed"] = "arrival",
    **options: Any,
) -> PipelineQueue:
    """A queue in window 0 of this plan, the only one."""
    real = [micro_batch for micro_batch in plan if micro_batch]
    queue = queue_of(in_flight, [real], order=order, **options)
    clients = sorted({piece.client for micro_batch in real for piece in micro_batch})
    for client in clients:
        queue.join(client, 0.0)
    announce(queue, *clients)
    assert isinstance(queue.decide(0.0), Plan)
    queue.start(len(plan), 0.0)
    return queue


def decided(queue: PipelineQueue, now: float = 0.0) -> list[str]:
    """Decisions until the queue waits, in short: `open 0`, `forward 0 ada+bo`, `backward 0 ada
    last`.
    """
    words = []
    while (decision := queue.decide(now)) is not None:
        match decision:
            case Plan(window, _, manifests, suspended):
                who = "+".join(sorted(manifest.client for manifest in manifests))
                over = f"without {'+'.join(sorted(suspended))}" if suspended else ""
                words.append(" ".join(filter(None, [f"plan {window}", who, over])))
            case Open(_, index, _):
                words.append(f"open {index}")
            case Forward(index, done):
                words.append(f"forward {index} {'+'.join(piece.client for piece in done)}".rstrip())
            case Backward(index, done):
                words.append(f"backward {index} {'+'.join(piece.client for piece in done)}".rstrip())
            case Suspend(client, skipped):
                words.append(f"suspend {client} {skipped}")
            case Expire(client):
                words.append(f"expire {client}")
            case Step(window, lost):
                words.append(f"step {window} lost {lost}")
    return words


def trained(queue: PipelineQueue, client: str, index: int, now: float = 0.0) -> list[str]:
    """A client's micro-batch from activations to backward."""
    queue.answer(client, index, "activations")
    words = decided(queue, now)
    queue.answer(client, index, "gradient")
    return words + decided(queue, now)


def scheduled(*micro_batches: str, num_micro_batches: int = 0) -> Schedule:
    """A schedule whose only window runs: `ada+bo` is a micro-batch that both have a piece in;
    dummies fill it up.
    """
    schedule = Schedule()
    schedule.plan(0, [pieces(*clients.split("+")) for clients in micro_batches])
    schedule.start(num_micro_batches)
    return schedule


def bring(schedule: Schedule, index: int, state: State) -> PlannedMicroBatch:
    """Take a micro-batch through its states up to this one; clients answer as it needs."""
    window = next(window for window in schedule.windows if index in window.micro_batches)
    micro_batch = window.micro_batches[index]
    while micro_batch.state < state:
        match micro_batch.state:
            case State.PLANNED:
                schedule.open(window, micro_batch)
            case State.OPEN:
                schedule.answer(min(micro_batch.awaited), index, "activations")
            case State.READY:
                schedule.forward(micro_batch)
            case State.FORWARDED:
                schedule.answer(min(micro_batch.awaited), index, "gradient")
            case _:
                schedule.backward(micro_batch)
    return micro_batch
