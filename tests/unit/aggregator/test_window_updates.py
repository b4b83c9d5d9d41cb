"""Updates of windows: from their clients to what the ranks commit, in order, or undone."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor

from fedbert_ds.aggregator.window_updates import Committed, WindowUpdates
from fedbert_ds.errors import WireError
from fedbert_ds.federation.client_update import ClientUpdate


def total(updates: Mapping[str, ClientUpdate], average: bool) -> dict[str, Tensor]:
    summed = sum((update.tensors["table"] for update in updates.values()), torch.zeros(2))
    return {"table": summed / len(updates) if average else summed}


@pytest.fixture(params=[True, False], ids=["clipped", "not clipped"])
def updates(request: pytest.FixtureRequest) -> Iterator[WindowUpdates]:
    made = WindowUpdates(total, ranks=2, most_early=1, clips=request.param)
    yield made
    made.close()


@pytest.fixture
def clips(request: pytest.FixtureRequest, updates: WindowUpdates) -> bool:
    return "not" not in request.node.callspec.id


def expect(updates: WindowUpdates, window: int, average: bool = False) -> None:
    updates.expect(0, window, average, {"ada": 1})
    updates.expect(1, window, average, {"bo": 1})


def deliver(updates: WindowUpdates, client: str, window: int, value: float) -> None:
    updates.deliver(client, window, lambda: {"table": torch.full((2,), value)})


def combined(updates: WindowUpdates) -> tuple[int, float]:
    deadline = time.monotonic() + 30
    while (result := updates.take_combined()) is None:
        assert time.monotonic() < deadline, "nothing was combined"
        time.sleep(1e-3)
    return result


def value(committed: Committed | None) -> tuple[int, float]:
    assert committed is not None
    return committed.window, float(committed.tensors["table"][0])


def test_a_window_is_combined_once_and_held_until_it_is_committed(updates: WindowUpdates, clips: bool) -> None:
    assert updates.is_idle
    deliver(updates, "bo", 0, 3.0)  # before every rank has announced the window
    expect(updates, 0)
    assert not updates.is_idle
    deliver(updates, "ada", 0, 1.0)
    window, norm = combined(updates)
    assert window == 0 and norm == pytest.approx(4.0 * 2**0.5 if clips else 0.0)
    assert updates.take_combined() is None and updates.take_committed() is None and not updates.is_idle
    updates.commit(0, 0.5)
    assert value(updates.take_committed()) == (0, 2.0)
    assert updates.take_committed() is None and updates.is_idle


def test_the_next_window_is_not_combined_before_the_last_one_is_applied(updates: WindowUpdates) -> None:
    for window in (0, 1):
        expect(updates, window, average=True)
        for client in ("ada", "bo"):
            deliver(updates, client, window, window + 1.0)
    updates.commit(1, 1.0)
    assert combined(updates)[0] == 0
    time.sleep(0.05)
    assert updates.take_combined() is None
    updates.commit(0, 1.0)
    assert value(updates.take_committed()) == (0, 1.0)
    assert combined(updates)[0] == 1
    assert value(updates.take_committed()) == (1, 2.0)


def test_a_client_that_is_forgotten_is_not_waited_for(updates: WindowUpdates) -> None:
    updates.expect(1, 0, False, {"bo": 1})
    updates.forget("bo")
    updates.expect(0, 0, False, {"ada": 1})
    deliver(updates, "ada", 0, 1.0)
    assert combined(updates)[0] == 0
    updates.commit(0, 1.0)
    assert value(updates.take_committed()) == (0, 1.0)


@pytest.mark.parametrize("is_committed", [False, True])
def test_a_window_that_is_undone_is_combined_anew(updates: WindowUpdates, is_committed: bool) -> None:
    expect(updates, 0)
    deliver(updates, "ada", 0, 5.0)
    deliver(updates, "bo", 0, 5.0)
    combined(updates)
    deliver(updates, "bo", 1, 9.0)
    if is_committed:
        updates.commit(0, 1.0)
    updates.undo(0)
    assert updates.is_idle and updates.take_committed() is None
    expect(updates, 0)
    deliver(updates, "ada", 0, 1.0)
    deliver(updates, "bo", 0, 2.0)
    assert combined(updates)[0] == 0
    updates.commit(0, 1.0)
    assert value(updates.take_committed()) == (0, 3.0)
    deliver(updates, "bo", 1, 4.0)  # what it sent of this window before is undone, too
    expect(updates, 1)
    deliver(updates, "ada", 1, 1.0)
    combined(updates)
    updates.commit(1, 1.0)
    assert value(updates.take_committed()) == (1, 5.0)


def test_windows_before_stay_as_they_are(updates: WindowUpdates) -> None:
    expect(updates, 0)
    for client in ("ada", "bo"):
        deliver(updates, client, 0, 1.0)
    combined(updates)
    updates.commit(0, 1.0)
    updates.undo(1)
    assert value(updates.take_committed()) == (0, 2.0)


def test_what_is_being_combined_cannot_be_undone(updates: WindowUpdates) -> None:
    expect(updates, 0)
    with pytest.raises(WireError, match="window 0 is to be undone while it is being combined"):
        updates.undo(0)


@pytest.mark.parametrize("scale", [0.0, -0.5, 1.5, float("nan")])
def test_a_scale_that_is_none_is_an_error(updates: WindowUpdates, scale: float) -> None:
    with pytest.raises(WireError, match="badly scaled"):
        updates.commit(0, scale)


def test_an_update_far_ahead_is_an_error(updates: WindowUpdates) -> None:
    for window in (0, 1):
        deliver(updates, "ada", window, 1.0)
    for window in (1, 2):
        with pytest.raises(WireError, match=f"an update of window {window}, which is not under way"):
            deliver(updates, "ada", window, 1.0)
