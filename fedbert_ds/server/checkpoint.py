"""Saving a run: clients say where they are, ranks save the body and rank 0 the client model; then
it counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fedbert_ds.atomic_write import atomic_write
from fedbert_ds.errors import RunError
from fedbert_ds.federation.reference import Reference, Shapes, from_bytes, to_bytes
from fedbert_ds.server.queue.deadlines import Question
from fedbert_ds.server.rank_group import RankGroup
from fedbert_ds.server.rooms import Rooms
from fedbert_ds.server.run_folder import CheckpointFolder
from fedbert_ds.wire import fedbert_pb2 as pb
from fedbert_ds.wire.messages import cursor_numbers

Cursors = Mapping[str, Mapping[str, int]]
"""Where each client stands in its text: epoch, position and sequences, by client."""


class Checkpoints:
    """Writes the checkpoints of a run; all ranks call `save` for the same windows.

    `cursors` are those of the checkpoint that the run resumed from.
    """

    def __init__(self, rooms: Rooms, folder: CheckpointFolder, cursors: Cursors) -> None:
        self._rooms = rooms
        self._folder = folder
        self._cursors = dict(cursors)
        self.client_figures: dict[str, pb.Saved] = {}
        """The last Saved message of each client of this rank: peak memory, FLOP per token."""

    def save(self, window: int) -> None:
        """Save the state before `window`. A client that does not answer in time is gone."""
        rooms = self._rooms
        rooms.service.finish_exchanges()
        rooms.inbox.expect_saved(window)
        rooms.service.ask(
            rooms.queue.clients,
            Question("saved", window),
            pb.ServerMessage(save=pb.Save(window=window)),
            rooms.inbox.saved,
            meanwhile=lambda: rooms.engine.save(self._folder.path, window),
        )
        self.client_figures.update(rooms.inbox.saved)
        mine = {client: cursor_numbers(saved.cursor) for client, saved in rooms.inbox.saved.items()}
        for cursors in rooms.rank_group.gather(mine):
            # A client that is gone keeps the cursor of its last checkpoint, and can come back
            # there.
            self._cursors.update(cursors)
        if rooms.rank_group.rank == 0:
            if rooms.aggregator is not None:
                reference = rooms.aggregator.reference()
            else:
                assert rooms.remote is not None
                rooms.remote.save(window, rooms.service.attend)
                reference = Reference(window, {})  # the other party has the weights
            write_client_model(self._folder.client_model(window), reference, self._cursors)
        complete(rooms.rank_group, self._folder, window)


def complete(rank_group: RankGroup, folder: CheckpointFolder, window: int) -> None:
    """Mark a checkpoint complete once all ranks have written their parts. All ranks call it."""
    rank_group.barrier()
    if rank_group.rank == 0:
        folder.mark_complete(window, rank_group.world_size)
    rank_group.barrier()


def write_client_model(path: Path, reference: Reference, cursors: Cursors) -> None:
    """Write the reference and the clients' cursors, whole or not at all."""
    with atomic_write(path) as partial:
        partial.write_bytes(to_bytes(reference, {"cursors": cursors}))


def read_client_model(path: Path, shapes: Shapes) -> tuple[Reference, Cursors]:
    """What `write_client_model` wrote, for a client model of these shapes; RunError if it is
    missing or damaged.
    """
    try:
        reference, notes = from_bytes(path.read_bytes(), shapes)
        cursors = {client: {key: int(n) for key, n in cursor.items()} for client, cursor in notes["cursors"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{path}: cannot be read ({error}); remove this window's folder to resume from the one before, or start "
            "anew in another run.directory"
        ) from error
    return reference, cursors
