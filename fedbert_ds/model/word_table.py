"""Gradients of the word table, added to it in place, so that no second table is ever made.

Embedding and decoder are one table. torch would make a dense gradient for each use of it and add
them up; here each use adds the rows it touches, a block at a time, to the gradient that is there.
The arithmetic of every entry, and its order, is torch's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

POSITIONS = 16
"""Positions whose scores are turned into gradients at once."""
WORDS = 1024
"""Rows of the table whose gradient is made at once."""


class WordTable(nn.Embedding):
    """An embedding whose backward adds to `weight.grad` only the rows that were looked up."""

    def forward(self, input: Tensor) -> Tensor:
        """Rows of the table, [*ids, width], for ids of any shape."""
        rows: Tensor = _LookUp.apply(self.weight, input, self.padding_idx)
        return rows


def decoder_backward(
    hidden: Tensor, weight: nn.Parameter, bias: nn.Parameter | None, targets: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Cross-entropies [m] in nats of hidden [m, D] @ weight [V, D]^T + bias [V], and the gradient
    [m, D] of scale * their sum.

    `targets` is [m] int64; m may be 0. The parameters' gradients of scale * sum accumulate. Only
    one tensor [m, V] is made: the scores, which become their gradient.
    """
    with torch.no_grad():
        scores = functional.linear(hidden, weight, bias)
        losses = []
        for rows, wanted in zip(scores.split(POSITIONS), targets.split(POSITIONS), strict=True):
            log_probabilities = rows.log_softmax(1)
            losses.append(functional.nll_loss(log_probabilities, wanted, reduction="none"))
            gradient = torch.zeros_like(rows).scatter_(1, wanted[:, None], -scale)
            rows.copy_(torch.ops.aten._log_softmax_backward_data(gradient, log_probabilities, 1, rows.dtype))
        if bias is not None:
            _gradient(bias).add_(scores.sum(0))
        total = _gradient(weight)
        for first in range(0, len(weight), WORDS):
            words = slice(first, first + WORDS)
            total[words].add_(scores[:, words].T @ hidden)
        return torch.cat(losses), scores @ weight


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding_idx: int | None) -> Tensor:
        ctx.weight, ctx.padding_idx = weight, padding_idx
        ctx.save_for_backward(ids)
        return functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        (gradient,), (ids,) = gradients, ctx.saved_tensors
        words, places = ids.unique(return_inverse=True)
        # Padding has no gradient.
        padding = (words == (-1 if ctx.padding_idx is None else ctx.padding_idx)).nonzero().flatten().tolist()
        rows = torch.ops.aten.embedding_dense_backward(gradient, places, len(words), *(padding or [-1]), False)
        _gradient(ctx.weight).index_add_(0, words, rows)
        return None, None, None


def _gradient(parameter: Tensor) -> Tensor:
    """The parameter's gradient so far, zeros before the first."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
