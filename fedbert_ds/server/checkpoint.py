"""Saving a run: clients say where they are, ranks save the body and rank 0 the client model; then
it counts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path

from pydantic import TypeAdapter

from fedbert_ds.atomic_write import atomic_write
from fedbert_ds.errors import RunError, writes
from fedbert_ds.federation.reference import Reference, Shapes, from_bytes, to_bytes
from fedbert_ds.server.checkpoint_folder import CheckpointFolder, Layout
from fedbert_ds.server.cursors import Cursor
from fedbert_ds.server.masked_counts import Count
from fedbert_ds.server.queue.deadlines import Question
from fedbert_ds.server.rank_group import RankGroup
from fedbert_ds.server.rooms import Rooms
from fedbert_ds.wire import fedbert_pb2 as pb


@dataclass(frozen=True)
class Books:
    """What a checkpoint keeps of each client besides weights."""

    cursors: dict[str, Cursor]
    masked: dict[str, Count] = field(default_factory=dict)
    votes: dict[str, tuple[float, float]] = field(default_factory=dict)
    """What a combiner remembers."""
    sizes: dict[str, tuple[float, float]] = field(default_factory=dict)
    """What is remembered of activations and gradients."""


BYTES_PER_PARAMETER = 16
"""Of a checkpoint, at most: a weight, its fp32 master and two moments. For the first one alone."""


class Checkpoints:
    """Writes and loads the checkpoints of a run; all ranks call it for the same windows."""

    def __init__(self, rooms: Rooms, folder: CheckpointFolder) -> None:
        self._rooms = rooms
        self._folder = folder
        self.client_figures: dict[str, pb.Saved] = {}
        """The last Saved message of each client of this rank: peak memory, FLOP per token."""

    def load(self, window: int) -> None:
        """Take the state before `window` over, whatever ranks and ZeRO stage wrote it: body,
        reference and cursors.
        """
        saved = self._folder.layout(window)
        self._rooms.engine.load(self._folder.path, window, saved.ranks, saved.zero_stage)
        aggregator = self._rooms.aggregator
        shapes = aggregator.shapes if aggregator is not None else {}
        reference, books = read_client_model(self._folder.client_model(window), shapes)
        if aggregator is not None:
            aggregator.load(reference)
        if self._rooms.combiner is not None:
            self._rooms.combiner.load_state(books.votes)
        self._rooms.cursors.roll_back(books.cursors)
        self._rooms.masked_counts.roll_back(books.masked)
        self._rooms.influence.load_state(books.sizes)
        self._rooms.service.restored = window

    def save(self, window: int) -> bool:
        """Save the state before `window`. A client that does not answer in time is gone.

        Returns whether the checkpoint counts. One that misses a client does not, where the run
        waits for clients that have states of their own, nor one that misses the aggregator of
        another party: the run goes back to the one before. RunError, on all ranks and before
        anything is written, where the disk has no room for it, and for one that cannot be written.
        """
        rooms = self._rooms
        self._make_room()
        rooms.service.finish_exchanges()
        rooms.inbox.expect_saved(window)
        rooms.service.ask(
            rooms.queue.clients,
            Question("saved", window),
            pb.ServerMessage(save=pb.Save(window=window)),
            rooms.inbox.saved,
            meanwhile=lambda: self._save_body(window),
        )
        self.client_figures.update(rooms.inbox.saved)
        here = rooms.members.at(rooms.rank_group.rank)
        mine = {client: cursor for client, cursor in rooms.cursors.committed.items() if client in here}
        my_counts = {client: count for client, count in rooms.masked_counts.committed.items() if client in here}
        is_whole = not (rooms.strategy.halves_are_personal and rooms.membership.absent)
        # A client that is gone keeps the cursor of the last window that counted, and can come back
        # there.
        cursors, masked = dict(rooms.cursors.committed), rooms.masked_counts.committed
        parts = rooms.rank_group.gather(
            (mine, my_counts, is_whole, frozenset(rooms.inbox.saved)),
            tuple[dict[str, Cursor], dict[str, Count], bool, frozenset[str]],
        )
        for others, counts, _, savers in parts:
            cursors.update(others)
            masked.update(counts)
            if rooms.strategy.halves_are_personal:
                rooms.members.note_states(savers, window)
        if not all(whole for _, _, whole, _ in parts):
            return False
        if not self._is_saved_elsewhere(window):
            return False
        if rooms.rank_group.rank == 0:
            # Where another party has the weights, only the cursors are saved here.
            reference = rooms.aggregator.reference() if rooms.aggregator is not None else Reference(window, {})
            votes = {} if rooms.combiner is None else rooms.combiner.state()
            books = Books(cursors, masked, votes, rooms.influence.state())
            write_client_model(self._folder.draft.client_model(window), reference, books)
        complete(rooms.rank_group, self._folder, window, rooms.engine.zero_stage)
        return True

    def _make_room(self) -> None:
        ranks = self._rooms.rank_group
        estimate = BYTES_PER_PARAMETER * (self._rooms.engine.num_parameters + self._client_parameters)
        problem = ranks.broadcast(self._folder.make_room(estimate) if ranks.rank == 0 else None, str | None)
        if problem is not None:
            raise RunError(problem)

    @property
    def _client_parameters(self) -> int:
        shapes = self._rooms.aggregator.shapes if self._rooms.aggregator is not None else {}
        return sum(map(prod, shapes.values()))

    def _save_body(self, window: int) -> None:
        with writes(self._folder.draft.of(window)):
            self._rooms.engine.save(self._folder.draft.path, window)

    def _is_saved_elsewhere(self, window: int) -> bool:
        """An aggregator of another party, if there is one, has saved the reference, too."""
        rooms = self._rooms
        if rooms.remote is None:
            return True
        is_saved = rooms.rank_group.rank == 0 and rooms.remote.save(window, rooms.service.attend)
        return rooms.rank_group.broadcast(is_saved, bool)


def complete(rank_group: RankGroup, folder: CheckpointFolder, window: int, zero_stage: int) -> None:
    """Mark a checkpoint complete once all ranks have written their parts. All ranks call it."""
    rank_group.barrier()
    if rank_group.rank == 0:
        folder.mark_complete(window, Layout(rank_group.world_size, zero_stage))
    rank_group.barrier()


def write_client_model(path: Path, reference: Reference, books: Books) -> None:
    """Write the reference and what is kept of each client, whole or not at all."""
    with atomic_write(path) as partial:
        partial.write_bytes(to_bytes(reference, asdict(books)))


def read_client_model(path: Path, shapes: Shapes) -> tuple[Reference, Books]:
    """What `write_client_model` wrote, for a client model of these shapes; RunError if it is
    missing or damaged.
    """
    try:
        reference, notes = from_bytes(path.read_bytes(), shapes)
        books: Books = TypeAdapter(Books).validate_python(notes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{path}: cannot be read ({error}); remove this window's folder to resume from the one before, or start "
            "anew in another run.directory"
        ) from error
    return reference, books
