"""Seeding for dropout draws what `torch.manual_seed` would."""

from __future__ import annotations

import torch
from torch.nn import functional

from fedbert_ds.model.dropout_seed import seed_dropout


def test_dropout_is_as_after_manual_seed() -> None:
    def drawn() -> torch.Tensor:
        return functional.dropout(torch.ones(100), 0.5)

    for seed in (0, 7, 2**63 - 1):
        torch.manual_seed(seed)
        expected = drawn()
        torch.rand(5)
        seed_dropout(seed, torch.device("cpu"))
        assert torch.equal(drawn(), expected)
        assert not torch.equal(drawn(), expected)
