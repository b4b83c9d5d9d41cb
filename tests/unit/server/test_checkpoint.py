"""A checkpoint counts once all ranks have written, and clients have saved or are gone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from unit.server.fake_client import FakeClient
from unit.server.fakes import Rank, run_config

from fedbert_ds.server.checkpoint import complete
from fedbert_ds.server.run_folder import CheckpointFolder
from fedbert_ds.wire import fedbert_pb2 as pb


class Ranks:
    """One of 3 ranks, whose barriers need nobody; `seen` is what the folder held at each."""

    def __init__(self, rank: int, folder: CheckpointFolder) -> None:
        self.rank, self.world_size = rank, 3
        self.seen: list[frozenset[int]] = []
        self._folder = folder

    def barrier(self) -> None:
        self.seen.append(self._folder.complete_windows())


@pytest.mark.parametrize(("rank", "after"), [(0, {5}), (1, set())])
def test_rank_0_marks_after_all_have_written_and_before_anybody_goes_on(
    tmp_path: Path, rank: int, after: set[int]
) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.of(5).mkdir(parents=True)
    ranks: Any = Ranks(rank, folder)
    complete(ranks, folder, 5)
    assert ranks.seen == [frozenset(), after]
    assert folder.num_ranks() == (3 if after else None)


def test_clients_save_first_and_one_that_stays_silent_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(clients={"minimum": 1}, run={"windows": 1})

    def silent(number: int, message: pb.ClientMessage) -> list[pb.ClientMessage]:
        return [] if message.WhichOneof("body") == "saved" else [message]

    clients = [FakeClient("ada", config), FakeClient("bo", config, alter=silent), FakeClient("cy", config)]
    rank = Rank(monkeypatch, config, clients)
    marked: list[tuple[int, frozenset[str]]] = []
    rank.served.folder.mark_complete = lambda window, ranks: marked.append((window, rank.served.rooms.queue.clients))
    assert rank.run() == 1
    assert rank.engine.saved == [1] and marked == [(1, {"ada", "cy"})]
    assert clients[1].refusal == "client bo was silent for 300 s (clients.silence_timeout)"
    assert rank.served.checkpoints.client_figures.keys() == {"ada", "cy"}
