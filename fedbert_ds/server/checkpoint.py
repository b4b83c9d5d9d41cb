"""Saving a run. Clients save their halves, ranks the body; a checkpoint then counts."""

from __future__ import annotations

from fedbert_ds.server.queue.deadlines import Question
from fedbert_ds.server.rank_group import RankGroup
from fedbert_ds.server.rooms import Rooms
from fedbert_ds.server.run_folder import CheckpointFolder
from fedbert_ds.wire import fedbert_pb2 as pb


class Checkpoints:
    """Writes the checkpoints of a run. All ranks call `save` for the same windows."""

    def __init__(self, rooms: Rooms, folder: CheckpointFolder) -> None:
        self._rooms = rooms
        self._folder = folder
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
        complete(rooms.rank_group, self._folder, window)


def complete(rank_group: RankGroup, folder: CheckpointFolder, window: int) -> None:
    """Mark a checkpoint complete once all ranks have written their parts. All ranks call it."""
    rank_group.barrier()
    if rank_group.rank == 0:
        folder.mark_complete(window, rank_group.world_size)
    rank_group.barrier()
