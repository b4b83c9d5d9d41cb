"""Updates of windows: combined in order, once, beside the body; which clients are awaited."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from fedbert_ds.errors import WireError
from fedbert_ds.federation.client_update import ClientUpdate, Tensors
from fedbert_ds.federation.update_exchange import UpdateExchange


def update(value: float) -> Callable[[], Tensors]:
    """Decodes to an update."""
    return lambda: {"table": torch.full((2,), value)}


def total(updates: Mapping[str, ClientUpdate], average: bool) -> dict[str, Tensor]:
    return {
        "table": sum((tensors["table"] for tensors, _ in updates.values()), torch.zeros(2)),
        "average": torch.tensor(average),
    }


def polled(exchange: UpdateExchange) -> tuple[int, dict[str, Tensor]]:
    deadline = time.monotonic() + 20.0
    while (result := exchange.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return result


def test_a_window_is_combined_when_all_have_delivered() -> None:
    exchange = UpdateExchange(total)
    assert exchange.is_idle and exchange.is_done(100)
    exchange.expect(3, dict.fromkeys(["ada", "bo"], 1), False)
    exchange.deliver(3, "ada", update(1.0))
    assert exchange.poll() is None and not exchange.is_idle and not exchange.is_combining
    assert exchange.is_done(3) and not exchange.is_done(4)
    exchange.deliver(3, "bo", update(2.0))
    window, tensors = polled(exchange)
    assert window == 3 and torch.equal(tensors["table"], torch.full((2,), 3.0)) and not tensors["average"]
    assert exchange.is_idle and exchange.is_done(4) and exchange.poll() is None


def test_windows_come_out_in_order_whichever_is_complete_first() -> None:
    exchange = UpdateExchange(total)
    for window in (0, 1):
        exchange.expect(window, dict.fromkeys(["ada", "bo"], 1), True)
    exchange.deliver(1, "ada", update(10.0))
    exchange.deliver(1, "bo", update(10.0))
    exchange.deliver(0, "ada", update(1.0))
    assert exchange.poll() is None and not exchange.is_combining
    exchange.deliver(0, "bo", update(1.0))
    assert [polled(exchange)[0] for _ in range(2)] == [0, 1]


def test_the_sum_depends_on_the_servers_counts_and_not_on_who_came_first() -> None:
    orders: list[list[float]] = []

    def combine(updates: Mapping[str, ClientUpdate], average: bool) -> dict[str, Tensor]:
        orders.append([weight for _, weight in updates.values()])
        return {}

    exchange = UpdateExchange(combine)
    for window, names in enumerate((["ada", "bo"], ["bo", "ada"])):
        exchange.expect(window, {name: len(name) for name in names}, True)
        for name in names:
            exchange.deliver(window, name, update(1.0))
        polled(exchange)
    assert orders == [[3.0, 2.0]] * 2


def test_what_nobody_waits_for_is_dropped() -> None:
    exchange = UpdateExchange(total)
    exchange.expect(0, dict.fromkeys(["ada", "bo"], 1), False)
    exchange.deliver(1, "ada", update(5.0))  # of a window that did not begin with it
    exchange.deliver(0, "cy", update(5.0))
    exchange.deliver(0, "ada", update(1.0))
    exchange.deliver(0, "ada", update(5.0))
    exchange.forget("bo")
    exchange.deliver(0, "bo", update(5.0))
    assert torch.equal(polled(exchange)[1]["table"], torch.ones(2))


def test_what_was_delivered_before_its_client_went_counts() -> None:
    exchange = UpdateExchange(total)
    exchange.expect(0, dict.fromkeys(["ada", "bo"], 1), False)
    exchange.deliver(0, "bo", update(2.0))
    exchange.forget("bo")
    exchange.deliver(0, "ada", update(1.0))
    assert torch.equal(polled(exchange)[1]["table"], torch.full((2,), 3.0))


def test_what_cannot_be_decoded_is_told_and_left_out() -> None:
    def unsound() -> ClientUpdate:
        raise WireError("a value is not finite")

    exchange = UpdateExchange(total)
    for window in (0, 1):
        exchange.expect(window, dict.fromkeys(["ada", "bo"], 1), False)
        exchange.deliver(window, "ada", update(1.0))
    exchange.deliver(0, "bo", unsound)
    told: list[tuple[str, BaseException]] = []
    deadline = time.monotonic() + 20.0
    while not told:
        assert exchange.poll() is None and exchange.is_combining and time.monotonic() < deadline
        told = exchange.take_unsound()
    assert [(client, str(error)) for client, error in told] == [("bo", "a value is not finite")]
    assert exchange.take_unsound() == []
    assert exchange.forget("bo") == [1], "the window it has not delivered yet"
    assert [polled(exchange)[0], polled(exchange)[0]] == [0, 1]


def test_a_window_is_combined_after_the_caller_has_had_the_one_before() -> None:
    """A server optimizer goes on from what the last result made of the reference."""
    applied: list[int] = []
    seen: list[list[int]] = []

    def combine(updates: Mapping[str, ClientUpdate], average: bool) -> dict[str, Tensor]:
        seen.append(list(applied))
        return {}

    exchange = UpdateExchange(combine)
    for window in range(3):
        exchange.expect(window, {}, True)
    for window in range(3):
        assert polled(exchange)[0] == window
        time.sleep(0.01)
        applied.append(window)
    assert seen == [[], [0], [0, 1]]


def test_a_window_of_nobody_is_combined_too() -> None:
    """Other ranks wait in the collective."""
    exchange = UpdateExchange(total)
    exchange.expect(0, {}, True)
    assert polled(exchange)[0] == 0


def test_it_goes_on_beside_and_errors_come_out() -> None:
    let_go = threading.Event()

    def combine(updates: Mapping[str, ClientUpdate], average: bool) -> dict[str, Tensor]:
        assert let_go.wait(20.0)
        raise RuntimeError("another rank is gone")

    exchange = UpdateExchange(combine)
    exchange.expect(0, {}, True)
    for _ in range(3):
        assert exchange.poll() is None and exchange.is_combining
    let_go.set()
    with pytest.raises(RuntimeError, match="another rank is gone"):
        polled(exchange)


def test_who_has_not_delivered_is_awaited() -> None:
    exchange = UpdateExchange(total)
    exchange.expect(0, dict.fromkeys(["ada", "bo", "cy"], 1), False)
    assert exchange.awaited(0) == {"ada", "bo", "cy"} and exchange.awaited(7) == frozenset()
    exchange.deliver(0, "ada", update(1.0))
    exchange.forget("cy")
    assert exchange.awaited(0) == {"bo"}
