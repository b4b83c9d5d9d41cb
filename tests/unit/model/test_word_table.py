"""The word table's gradient is torch's, bit for bit, and no second table is made for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from fedbert_ds.model.word_table import WORDS, WordTable, decoder_backward

VOCABULARY, WIDTH = 2 * WORDS + 77, 24


def parameters() -> tuple[nn.Parameter, nn.Parameter]:
    random = torch.Generator().manual_seed(1)
    return (
        nn.Parameter(torch.randn(VOCABULARY, WIDTH, generator=random)),
        nn.Parameter(torch.randn(VOCABULARY, generator=random)),
    )


@pytest.mark.parametrize("padding_idx", [None, 3])
def test_looked_up_rows_get_torchs_gradient(padding_idx: int | None) -> None:
    table, plain = (nn.Embedding(50, WIDTH, padding_idx=padding_idx) for _ in range(2))
    table.load_state_dict(plain.state_dict())
    table.__class__ = WordTable
    for seed in range(3):
        ids = torch.randint(0, 20, (2, 30), generator=torch.Generator().manual_seed(seed))
        gradient = torch.randn(2, 30, WIDTH)
        for embedding in (table, plain):
            embedding(ids).backward(gradient)
        assert torch.equal(table(ids), plain(ids))
        assert torch.equal(table.weight.grad, plain.weight.grad)


@pytest.mark.parametrize("count", [0, 1, 40])
def test_decoder_and_loss_get_torchs_gradients(count: int) -> None:
    (weight, bias), (plain_weight, plain_bias) = parameters(), parameters()
    for seed in range(2):
        random = torch.Generator().manual_seed(seed)
        hidden = torch.randn(count, WIDTH, generator=random)
        targets = torch.randint(0, VOCABULARY, (count,), generator=random)
        losses, gradient = decoder_backward(hidden, weight, bias, targets, 0.3)
        leaf = hidden.clone().requires_grad_()
        loss = functional.cross_entropy(functional.linear(leaf, plain_weight, plain_bias), targets, reduction="none")
        loss.backward(torch.full_like(loss, 0.3))
        assert torch.equal(losses, loss) and torch.equal(gradient, leaf.grad)
    assert torch.equal(weight.grad, plain_weight.grad) and torch.equal(bias.grad, plain_bias.grad)


class LargestResult(TorchDispatchMode):
    """The most entries any operation makes; views and results in place are none."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.entries, self._known = 0, known

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self._known:
                self.entries = max(self.entries, tensor.numel())
        return result


def test_no_second_table_is_made() -> None:
    weight, bias = parameters()
    weight.grad = torch.zeros_like(weight)
    table = WordTable(VOCABULARY, WIDTH, _weight=weight)
    table.weight = weight
    known = {tensor.untyped_storage().data_ptr() for tensor in (weight, weight.grad)}
    with LargestResult(known) as largest:
        decoder_backward(torch.randn(5, WIDTH), weight, bias, torch.arange(5), 1.0)
        table(torch.arange(60)).backward(torch.randn(60, WIDTH))
    assert largest.entries < weight.numel() / 2
