"""An aggregator of another party that is opened, lost, looked for and opened again."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from unit.aggregator.coordinator import PADDING, TIMEOUT, WORDS, Process, config_of
from unit.server.fakes import FakeRankGroup

from fedbert_ds.config import RunConfig
from fedbert_ds.errors import AggregatorLost, RunError, WireError
from fedbert_ds.model.checkpoint import build_model, shape_hash
from fedbert_ds.server.elsewhere import Elsewhere
from fedbert_ds.wire import fedbert_pb2 as pb


@contextmanager
def elsewhere_of(config: RunConfig) -> Iterator[Elsewhere]:
    model = build_model(config.model, WORDS, PADDING, seed=0)
    made = Elsewhere(config, FakeRankGroup(), WORDS, PADDING, shape_hash(model.config))  # type: ignore[arg-type]
    try:
        yield made
    finally:
        made.stop()


def report(elsewhere: Elsewhere) -> pb.Report:
    told = elsewhere.take(TIMEOUT)
    assert told is not None
    return told


def until_found(elsewhere: Elsewhere) -> bytes:
    wait = threading.Event()
    for _ in range(int(TIMEOUT / 0.02)):
        if found := elsewhere.opened_again():
            return found
        wait.wait(0.02)
    raise AssertionError("the aggregator was not found")


def lose(elsewhere: Elsewhere, process: Process) -> None:
    """The aggregator gives up over a nonsensical order, and its process ends."""
    for _ in range(2):
        elsewhere.send(pb.Order(commit=pb.Commit(window=0, scale=1.0)))
    with pytest.raises(AggregatorLost, match="committed twice"):
        report(elsewhere)
    assert isinstance(process.ended(), WireError)


@contextmanager
def found_again(folder: Path, window: int) -> Iterator[tuple[Elsewhere, bytes]]:
    """One whose aggregator had saved this window, was lost and is found again, and what it said."""
    config = config_of(folder)
    process = Process(config)
    with elsewhere_of(config) as elsewhere:
        assert elsewhere.open(resume=False) == frozenset()
        saved(elsewhere, window)
        lose(elsewhere, process)
        assert elsewhere.opened_again() == elsewhere.opened_again() == b"", "it is looked for once"
        Process(config, resume=True)
        yield elsewhere, until_found(elsewhere)


def saved(elsewhere: Elsewhere, window: int) -> None:
    elsewhere.send(pb.Order(admit=pb.Admit(window=0)))
    elsewhere.send(pb.Order(save=pb.Save(window=window)))
    assert report(elsewhere).admitted == pb.Admitted()
    assert report(elsewhere).saved.window == window


def test_a_lost_aggregator_is_found_when_it_is_back(tmp_path: Path) -> None:
    with found_again(tmp_path, window=2) as (elsewhere, opened):
        assert elsewhere.opened_again() == opened, "until it is dialled"
        elsewhere.reopen(opened, 2)
        elsewhere.send(pb.Order(admit=pb.Admit(window=2)))
        assert report(elsewhere).admitted == pb.Admitted(window=2)


def test_it_may_be_lost_more_than_once(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    process = Process(config)
    with elsewhere_of(config) as elsewhere:
        elsewhere.open(resume=False)
        saved(elsewhere, 1)
        for _ in range(2):
            lose(elsewhere, process)
            process = Process(config, resume=True)
            elsewhere.reopen(until_found(elsewhere), 1)
            elsewhere.send(pb.Order(admit=pb.Admit(window=1)))
            assert report(elsewhere).admitted == pb.Admitted(window=1)


def test_an_aggregator_without_its_folder_is_no_return(tmp_path: Path) -> None:
    told = r"without the client model of window 3 \(it has 1\); give it its folder"
    with found_again(tmp_path, window=1) as (elsewhere, opened), pytest.raises(RunError, match=told):
        elsewhere.reopen(opened, 3)


def test_why_an_aggregator_does_not_come_back_is_told(tmp_path: Path) -> None:
    config = config_of(tmp_path, clients={"join_timeout": 0.5, "reconnect_timeout": 5.0})
    process = Process(config_of_longer(config))
    with elsewhere_of(config) as elsewhere:
        wait = threading.Event()
        for _ in range(100):
            try:
                elsewhere.open(resume=False)
                break
            except WireError:
                wait.wait(0.05)
        lose(elsewhere, process)
        with pytest.raises(RunError, match=r"the aggregator did not come back: .*no aggregator answers"):
            until_found(elsewhere)


def config_of_longer(config: RunConfig) -> RunConfig:
    """The aggregator's own, which may wait for the server."""
    clients: Any = config.clients.model_copy(update={"join_timeout": TIMEOUT})
    return config.model_copy(update={"clients": clients})
