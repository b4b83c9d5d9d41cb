"""An aggregator process from its start to its end, over loopback, with ranks that train nothing."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from unit.aggregator.coordinator import TIMEOUT, Process, Rank, config_of, federation, first_weights, opened

from fedbert_ds.aggregator.folder import AggregatorFolder
from fedbert_ds.aggregator.process import STOPPED, run_aggregator
from fedbert_ds.config import RunConfig
from fedbert_ds.errors import AggregatorLost, ConfigError, RunError, WireError
from fedbert_ds.folder_lock import locked
from fedbert_ds.server.admission import new_session
from fedbert_ds.wire import fedbert_pb2 as pb


def attend(rank: Rank) -> None:
    rank.exchange.take_unsound()
    threading.Event().wait(0.01)


def end(ranks: list[Rank], window: int, complete: bool = True) -> None:
    ranks[0].remote.conclude(window, complete, {})
    for rank in ranks:
        rank.remote.await_result(lambda rank=rank: attend(rank))
    ranks[0].remote.finish("the run is over", complete)


def test_a_run_moves_the_reference_and_gives_every_client_the_same(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    process = Process(config)
    start = first_weights(config)
    with federation(config, (("ada", "bo"), ("cy",))) as (ranks, clients):
        for client in clients.values():
            reference = client.reference()
            assert reference.version == 0 and all(torch.equal(reference.weights[n], start[n]) for n in start)
        clients["cy"].send(0, 4.0)  # before any rank has announced the window
        ranks[1].exchange.expect(0, dict.fromkeys(["cy"], 1), average=False)
        ranks[0].exchange.expect(0, dict.fromkeys(["ada", "bo"], 1), average=False)
        for name, value in (("ada", 1.0), ("bo", 2.0)):
            clients[name].send(0, value)
        count = sum(tensor.numel() for tensor in start.values())
        for rank in ranks:
            assert rank.combined() == 0 and rank.exchange.norms[0] == pytest.approx(7.0 * count**0.5)
        ranks[0].remote.commit(0, 0.5)
        for client in clients.values():
            window, combined = client.update()
            assert window == 0 and all((tensor == 3.5).all() for tensor in combined.values())
        ranks[0].remote.save(1, lambda: attend(ranks[0]))
        end(ranks, 1)
        assert process.ended() == 0
    folder = tmp_path / "run-aggregator"
    assert (folder / "reference-1.safetensors").is_file()
    final = load_file(folder / "client_model.safetensors")
    assert final.keys() == start.keys()
    for name, tensor in final.items():  # one step of SGD, rate 0.5, with the clipped sum
        torch.testing.assert_close(tensor, start[name] - 0.5 * 3.5, rtol=1e-5, atol=1e-5)


def test_personal_halves_are_collected_for_the_result(tmp_path: Path) -> None:
    config = config_of(tmp_path, federation={"mode": "parallel", "average_every": 2})
    process = Process(config)
    with federation(config, (("ada", "bo"),)) as (ranks, clients):
        for client in clients.values():
            client.reference()
        ranks[0].exchange.expect(1, {"ada": 3, "bo": 1}, average=True)
        for name, value in (("ada", 1.0), ("bo", 3.0)):
            clients[name].send(1, value)
        assert ranks[0].combined() == 1 and ranks[0].exchange.norms[1] == 0.0
        ranks[0].remote.commit(1, 1.0)
        for client in clients.values():
            assert all((tensor == 1.5).all() for tensor in client.update()[1].values())
        ranks[0].remote.conclude(2, complete=False, masked={"ada": 3, "bo": 1})
        for name, value in (("ada", 8.0), ("bo", 4.0)):
            request = clients[name].stream.receive()
            assert request.update_request.window == 2
            clients[name].send(2, value)
        ranks[0].remote.await_result(lambda: attend(ranks[0]))
        ranks[0].remote.finish("stopped", complete=False)
        assert process.ended() == STOPPED
    final = load_file(tmp_path / "run-aggregator" / "client_model.safetensors")
    assert all((tensor == 7.0).all() for tensor in final.values()), "by masked tokens of the whole run"


def test_a_client_that_breaks_the_protocol_or_leaves_is_lost_alone(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    Process(config)
    with federation(config, (("ada", "bo", "cy", "di"),)) as ([rank], clients):
        for client in clients.values():
            client.reference()
        rank.exchange.expect(0, dict.fromkeys(["ada", "bo", "cy", "di"], 1), average=False)
        clients["ada"].send(0, 1.0)
        clients["bo"].stream.send(pb.ClientMessage(activations=pb.Activations(window=0)))
        assert rank.lost() == (
            "bo", "client bo: a message of kind activations belongs to the server, not to the aggregator",
        )  # fmt: skip
        assert "belongs to the server" in clients["bo"].stream.receive().refused.reason
        clients["cy"].send(0, float("nan"))
        assert rank.lost()[0] == "cy"
        clients["di"].leave()
        assert rank.lost() == ("di", "client di lost its connection to the aggregator")
        assert rank.combined() == 0
        rank.remote.commit(0, 1.0)
        assert all((tensor == 1.0).all() for tensor in clients["ada"].update()[1].values())
        rank.remote.part_with("ada")
        assert "ended this client's part" in clients["ada"].stream.receive().refused.reason
        rank.remote.finish("done", complete=False)


def test_a_restarted_aggregator_goes_on_where_the_server_says(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    process = Process(config)
    with federation(config, (("ada",),)) as ([rank], clients):
        clients["ada"].reference()
        for window in range(3):
            rank.exchange.expect(window, dict.fromkeys(["ada"], 1), average=False)
            clients["ada"].send(window, 1.0)
            assert rank.combined() == window
            rank.remote.commit(window, 1.0)
            clients["ada"].update()
            rank.remote.save(window + 1, lambda: attend(rank))
        rank.remote.finish("stopped", complete=False)
        assert process.ended() == STOPPED
    assert isinstance(Process(config).ended(), RunError), "the folder holds a run"
    Process(config, resume=True)
    with pytest.raises(WireError, match=r"the aggregator refused this run: .* add --resume at the server"):
        opened(config)
    assert list(opened(config, resume=True).saved_windows) == [2, 3]
    with federation(config, (("ada",),), window=2, resume=True) as ([rank], clients):
        reference, start = clients["ada"].reference(), first_weights(config)
        assert reference.version == 2
        for name, tensor in reference.weights.items():
            torch.testing.assert_close(tensor, start[name] - 2 * 0.5, rtol=1e-5, atol=1e-5)
        rank.remote.finish("done", complete=True)


def test_a_server_that_comes_back_finds_the_aggregator_waiting(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    process = Process(config)
    with federation(config, (("ada",),)) as (_, clients):
        clients["ada"].reference()  # and the server is gone without a word
    with federation(config, (("ada",),)) as ([rank], clients):
        assert clients["ada"].reference().version == 0
        rank.remote.finish("done", complete=True)
        assert process.ended() == 0


def test_a_rank_of_the_run_before_is_not_heard_in_the_next(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    process = Process(config)
    with federation(config, (("ada",), ("bo",))) as ([_, old], clients):
        clients["bo"].reference()
        with federation(config, (("ada",), ("bo",)), resume=True) as ([first, second], again):
            old.line.send(pb.Order(undo=pb.Undo(window=0, attempt=1)))
            old.line.send(pb.Order(drop=pb.Drop(client="bo", gone=True)))
            for client in again.values():
                client.reference()
            for rank, name in ((first, "ada"), (second, "bo")):
                rank.exchange.expect(0, dict.fromkeys([name], 1), average=False)
                again[name].send(0, 1.0)
            assert first.combined() == second.combined() == 0
            first.remote.finish("done", complete=True)
            assert process.ended() == 0


def test_the_end_of_the_server_before_does_not_end_the_run_of_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That its line was lost is heard after the next server has opened its run."""
    config = config_of(tmp_path)
    process = Process(config)
    [session] = opened(config).sessions
    before = Rank(config, 0, session)
    before.remote.admit({"ada": new_session()}, TIMEOUT)
    whole_windows = AggregatorFolder.whole_windows

    def while_the_line_ends(folder: AggregatorFolder, tell: Any) -> tuple[int, ...]:
        before.line.stop()
        return whole_windows(folder, tell)

    monkeypatch.setattr(AggregatorFolder, "whole_windows", while_the_line_ends)
    with federation(config, (("ada",),), resume=True) as (ranks, clients):
        assert clients["ada"].reference().version == 0
        end(ranks, 0)
        assert process.ended() == 0


def test_a_lost_aggregator_says_why_and_is_awaited_no_more(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    Process(config)
    with federation(config, (("ada",),)) as ([rank], _):
        rank.remote.commit(0, 1.0)
        rank.remote.commit(0, 1.0)  # nonsense, so it gives up
        client, reason = rank.lost()
        assert client == "ada" and "cannot go on: window 0 committed twice" in reason
        assert rank.remote.lost == reason and rank.exchange.is_idle
        with pytest.raises(AggregatorLost, match=r"committed twice.*; start it and this run again, both with --resume"):
            rank.remote.await_result(lambda: attend(rank))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"optimizer": {"lr": 0.25}}, "optimizer.lr is 0.5 at the aggregator and 0.25 at the server"),
        ({"model": {"checkpoint": "bert"}}, "model.checkpoint is false"),
        ({"aggregator": {"secret": "other"}}, "does not know the aggregator's secret"),
    ],
)
def test_a_server_that_does_not_fit_is_refused_and_the_aggregator_waits_on(
    tmp_path: Path, changed: dict, told: str
) -> None:
    config = config_of(tmp_path)
    Process(config)
    (tmp_path / "other").write_text("another secret of nobody")
    tree = config.model_dump(mode="json")
    for section, values in changed.items():
        if "secret" in values:
            values = {"secret": str(tmp_path / "other")}
        tree[section] |= values
    from fedbert_ds.model.checkpoint import build_model, shape_hash
    from fedbert_ds.server.control_line import open_run

    shape = shape_hash(build_model(config.model, 23, 0, seed=0).config)
    with pytest.raises(WireError, match="the aggregator refused this run: .*" + told):
        open_run(RunConfig.model_validate(tree), 1, 23, 0, shape, False)
    with pytest.raises(WireError, match="another shape"):
        open_run(config, 1, 24, 0, shape, False)
    with pytest.raises(WireError, match="a server of 0 ranks"):
        open_run(config, 0, 23, 0, shape, False)
    assert len(opened(config).sessions) == 1


def test_a_seed_of_its_own_keeps_the_first_client_model_from_the_server(tmp_path: Path) -> None:
    config = config_of(tmp_path, aggregator={"seed": 99})
    Process(config)
    with federation(config, (("ada",),)) as ([rank], clients):
        weights = clients["ada"].reference().weights
        assert not torch.equal(*(w["bert.embeddings.word_embeddings.weight"] for w in (weights, first_weights(config))))
        assert all(torch.equal(weights[n], w) for n, w in first_weights(config, seed=99).items())
        rank.remote.finish("done", complete=True)


def test_two_aggregators_do_not_share_a_folder(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    with locked(tmp_path / "run-aggregator", "aggregator.directory"):
        error = Process(config).ended()
    assert isinstance(error, RunError) and "run-aggregator: in use by process" in str(error)
    assert str(error).endswith("; end that first, or set another aggregator.directory")


def test_without_a_server_it_ends(tmp_path: Path) -> None:
    error = Process(config_of(tmp_path, clients={"join_timeout": 0.2})).ended()
    assert isinstance(error, RunError) and "no server came in 0 s (clients.join_timeout)" in str(error)


def test_without_its_section_there_is_nothing_to_do() -> None:
    error = Process(RunConfig()).ended()
    assert isinstance(error, ConfigError) and "no such section" in str(error)
    assert TIMEOUT


def test_plain_text_beyond_this_machine_must_be_asked_for(tmp_path: Path) -> None:
    section = config_of(tmp_path).aggregator
    assert section is not None
    beyond = config_of(tmp_path).model_copy(update={"aggregator": section.model_copy(update={"host": "0.0.0.0"})})
    with pytest.raises(ConfigError, match=r"aggregator\.host: 0\.0\.0\.0 listens .* or aggregator\.plaintext: true"):
        run_aggregator(beyond, resume=False)
