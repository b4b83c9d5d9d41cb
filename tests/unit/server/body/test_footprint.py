"""What a graph keeps, counted once and without parameters; a share of what memory is free."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedbert_ds.config import ModelSection
from fedbert_ds.model.checkpoint import config_of
from fedbert_ds.model.cut import body_skeleton
from fedbert_ds.server.body.footprint import SHARE, bytes_kept, memory_budget, saved_bytes
from fedbert_kernels.attention import attention


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
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert memory_budget(torch.device("cpu")) == SHARE * 1000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory_budget(torch.device("cpu")) == SHARE * 1000 // 4


@pytest.mark.parametrize("recomputed", ["none", "elementwise", "attention", "int8", "layers"])
@pytest.mark.parametrize("cut", ["embeddings", "rows"])
@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
def test_what_is_counted_is_what_a_forward_keeps(architecture: Any, cut: Any, recomputed: Any) -> None:
    """In fp32: in bf16 a CPU's LayerNorm keeps its means in bf16, a GPU's in fp32."""
    section = ModelSection(
        architecture=architecture, num_hidden_layers=3, hidden_size=32, num_attention_heads=2, dropout=0.0
    )
    hf_config, lengths = config_of(section, 50, 0), [7, 7, 2]
    counted = bytes_kept(hf_config, cut, "torch", recomputed, torch.float32, lengths, 3, 5 if cut == "rows" else None)
    body = body_skeleton(hf_config, cut).train()
    body.recompute(recomputed)
    # Attention that keeps no scores; here its body for the CPU.
    body.attend = attention
    row_index = torch.arange(16) % 5 if cut == "rows" else None
    values = torch.zeros(5 if cut == "rows" else 16, 32, requires_grad=True)
    with saved_bytes(body.parameters()) as saved:
        body(values, torch.tensor([1, 0, 9]), torch.tensor([0, 7, 14, 16]), row_index)
    assert saved.num_bytes == counted
