"""What a graph keeps, counted once and without parameters; a share of what memory is free."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fedbert_ds.server.body.footprint import SHARE, memory_budget, saved_bytes


def test_saved_storages_are_counted_once_and_parameters_not_at_all() -> None:
    weight = torch.nn.Parameter(torch.ones(64, 64))
    values = torch.ones(10, 64, requires_grad=True)
    with saved_bytes([weight]) as saved:
        hidden = values @ weight  # keeps `values`, and the parameter
        result = (hidden * hidden).sum()  # keeps `hidden`, twice
    assert saved.num_bytes == 2 * 10 * 64 * 4
    result.backward()
    assert values.grad is not None and weight.grad is not None


def test_what_is_built_outside_is_not_counted() -> None:
    values = torch.ones(8, requires_grad=True)
    with saved_bytes([]) as saved:
        pass
    (values * values).sum()
    assert saved.num_bytes == 0


def test_ranks_of_a_machine_share_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    free = SimpleNamespace(available=1000)
    monkeypatch.setattr("fedbert_ds.server.body.footprint.psutil.virtual_memory", lambda: free)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert memory_budget(torch.device("cpu")) == SHARE * 1000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory_budget(torch.device("cpu")) == SHARE * 1000 // 4
