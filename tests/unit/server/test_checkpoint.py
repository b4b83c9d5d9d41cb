"""A checkpoint counts once all ranks have written, and clients have saved or are gone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from unit.server.fake_client import HALF, SEQUENCES, FakeClient
from unit.server.fakes import Rank, run_config

from fedbert_ds.errors import RunError
from fedbert_ds.federation.reference import Reference
from fedbert_ds.server.checkpoint import Books, complete, read_client_model, write_client_model
from fedbert_ds.server.checkpoint_folder import CheckpointFolder, Layout
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
    complete(ranks, folder, 5, 2)
    assert ranks.seen == [frozenset(), after]
    assert not after or folder.layout(5) == Layout(ranks=3, zero_stage=2)


def test_clients_save_first_and_one_that_stays_silent_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(clients={"minimum": 1}, run={"windows": 1})

    def silent(number: int, message: pb.ClientMessage) -> list[pb.ClientMessage]:
        return [] if message.WhichOneof("body") == "saved" else [message]

    clients = [FakeClient("ada", config), FakeClient("bo", config, alter=silent), FakeClient("cy", config)]
    rank = Rank(monkeypatch, config, clients)
    marked: list[tuple[int, frozenset[str]]] = []
    rank.served.folder.mark_complete = lambda window, layout: marked.append((window, rank.served.rooms.queue.clients))
    assert rank.run() == 1
    reference, books = read_client_model(rank.served.folder.client_model(1), HALF)
    after_one_window = {"epoch": 0, "position": 4, "sequences": SEQUENCES}
    assert books.cursors == dict.fromkeys(("ada", "bo", "cy"), after_one_window), "bo's window counts, too"
    assert reference.version == 1
    assert rank.engine.saved == [1] and marked == [(1, {"ada", "cy"})]
    assert clients[1].refusal == "client bo was silent for 300 s (clients.silence_timeout)"
    assert rank.served.checkpoints.client_figures.keys() == {"ada", "cy"}


def test_a_client_that_is_gone_keeps_its_cursor(monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(clients={"minimum": 1}, run={"windows": 1})
    rank = Rank(monkeypatch, config, [FakeClient(name, config) for name in ("ada", "bo", "cy")])
    old = {"epoch": 2, "position": 3, "sequences": 900}
    rank.served.rooms.cursors.roll_back({"dee": old, "bo": old})
    rank.run()
    assert rank.clients[1].begins[0].cursor == pb.Cursor(**old)
    _, books = read_client_model(rank.served.folder.client_model(1), HALF)
    assert books.cursors["dee"] == old and books.cursors["bo"] == {"epoch": 0, "position": 7, "sequences": SEQUENCES}


def test_what_was_saved_is_taken_over_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Body, reference and cursors; whoever connects then may begin with a state of its own."""
    config = run_config(run={"windows": 3, "save_every": 1})
    rank = Rank(monkeypatch, config, [FakeClient(name, config) for name in ("ada", "bo", "cy")])
    assert rank.run() == 3
    rooms = rank.served.rooms
    at_3 = {name: tensor.clone() for name, tensor in rooms.aggregator.reference().weights.items()}
    assert rooms.cursors.committed["bo"]["position"] == 12 and rooms.service.restored is None
    rank.served.checkpoints.load(2)
    assert rank.engine.loaded == [2] and rooms.service.restored == 2
    reference = rooms.aggregator.reference()
    assert reference.version == 2
    assert not any(torch.equal(tensor, at_3[name]) for name, tensor in reference.weights.items())
    assert rooms.cursors.committed["bo"]["position"] == 8


def test_a_full_disk_is_one_line_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the first one the size is known from the parameters: 16 bytes each, of body and half."""
    config = run_config(run={"windows": 3, "save_every": 1})
    rank = Rank(monkeypatch, config, [FakeClient(name, config) for name in ("ada", "bo", "cy")])
    asked: list[int] = []

    def make_room(estimate: int) -> str | None:
        asked.append(estimate)
        return "no room; free some" if len(asked) == 2 else None

    rank.served.folder.make_room = make_room
    with pytest.raises(RunError, match="no room; free some"):
        rank.run()
    assert asked == [16 * (1000 + sum(torch.Size(shape).numel() for shape in HALF.values()))] * 2
    assert rank.engine.saved == [1]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("write failed\nat line 3")])
def test_a_body_that_cannot_be_written_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    config = run_config(run={"windows": 1})
    rank = Rank(monkeypatch, config, [FakeClient(name, config) for name in ("ada", "bo", "cy")])

    def fail(folder: Path, window: int) -> None:
        raise error

    rank.engine.save = fail
    with pytest.raises(RunError, match=r"window-1: cannot be written \(.*\); what was saved before is whole") as caught:
        rank.run()
    assert "\n" not in str(caught.value) and "line 3" not in str(caught.value)


def test_the_client_model_comes_back_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "window-4" / "client_model.safetensors"
    weights = {name: torch.randn(shape) for name, shape in HALF.items()}
    moments = {name: {"step": 4, "exp_avg": torch.randn(shape)} for name, shape in HALF.items()}
    books = Books({"Ada \u00e9": {"epoch": 2, "position": 17, "sequences": 40}}, {"bo": (70, 5)}, {"bo": (0.1, 5.0)})
    write_client_model(path, Reference(4, weights, moments), books)
    reference, again = read_client_model(path, HALF)
    assert again == books and reference.version == 4
    for name in HALF:
        assert torch.equal(reference.weights[name], weights[name])
        assert torch.equal(reference.optimizer[name]["exp_avg"], moments[name]["exp_avg"])
        assert reference.optimizer[name]["step"] == 4


@pytest.mark.parametrize("damage", [b"", b"nonsense of some length", None])
def test_a_client_model_that_cannot_be_read_is_one_line(tmp_path: Path, damage: bytes | None) -> None:
    path = tmp_path / "client_model.safetensors"
    if damage is not None:
        path.write_bytes(damage)
    with pytest.raises(RunError, match=r"client_model\.safetensors: cannot be read") as caught:
        read_client_model(path, HALF)
    assert "\n" not in str(caught.value)
