"""A rank that has trained for long keeps no more entries of anything than one that has not."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from unit.server.bad_clients import trio
from unit.server.fakes import Rank, run_config

FIRST, LAST = 40, 200
"""Windows after which everything is counted; what is bounded may still grow a little."""

CONTAINERS = (list, dict, set, frozenset, tuple, deque)


@pytest.mark.parametrize(
    ("mode", "order", "on_loss"),
    [
        ("synchronous", "arrival", "continue"),
        ("synchronous", "fixed", "wait"),
        ("parallel", "arrival", "wait"),
        ("sequential", "arrival", "continue"),
    ],
)
def test_nothing_grows_by_an_entry_a_window(
    monkeypatch: pytest.MonkeyPatch, mode: str, order: str, on_loss: str
) -> None:
    config = run_config(
        run={"windows": LAST + 1, "save_every": 1},
        window={"order": order},
        federation={"mode": mode},
        clients={"on_loss": on_loss},
    )
    rank = Rank(monkeypatch, config, trio(config))
    sizes: dict[int, dict[str, int]] = {}

    def look(window: int, _: Any) -> None:
        if window in (FIRST, LAST):
            sizes[window] = dict(entries("", rank.server, set()))

    rank.served.connect()
    rank.server.train(look, rank.served.checkpoints)
    assert any("saved_windows" in path for path in sizes[FIRST]), "it looks into everything"
    grown = {
        path: (sizes[FIRST].get(path, 0), size)
        for path, size in sizes[LAST].items()
        if size - sizes[FIRST].get(path, 0) >= (LAST - FIRST) // 2
    }
    assert not grown


def entries(path: str, thing: Any, seen: set[int]) -> Iterator[tuple[str, int]]:
    """(path, number of entries) of each container that an object of this project holds."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, CONTAINERS):
        yield path, len(thing)
        items = thing.items() if isinstance(thing, Mapping) else enumerate(thing)
        for key, value in items:
            yield from entries(f"{path}[{key}]", value, seen)
    elif type(thing).__module__.startswith("fedbert_ds."):
        names = [*vars(thing)] if hasattr(thing, "__dict__") else thing.__slots__
        for name in names:
            yield from entries(f"{path}.{name}", getattr(thing, name), seen)
