"""Floating-point operations of the body's forward and backward, counted from its matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from fedbert_ds.config import Cut, LayersCut
from fedbert_ds.model.architecture import architecture, layers_of, linear_parameters


@dataclass(frozen=True)
class BodyWork:
    """Entries of matrices, and what attention sees."""

    per_token: int
    """Entries of matrices that multiply every token's row."""
    per_masked: int
    """Of those that multiply masked positions' rows only: the last feed-forward and after."""
    hidden_size: int
    sliding_windows: tuple[int | None, ...]
    """By layer: positions that a token sees on either side; None is all."""

    def flops_per_token(self, mask_share: float, sequence_length: float) -> float:
        """Floating-point operations of forward and backward per token.

        Matrix products only: 6 per matrix entry, and 12 x hidden size x the tokens that a token
        sees, a layer, for the scores and their use. `sequence_length` is the mean over tokens;
        sliding windows count as if every sequence had it.
        """
        seen = sum(_seen(sequence_length, each_side) for each_side in self.sliding_windows)
        return 6.0 * (self.per_token + 2 * self.hidden_size * seen + mask_share * self.per_masked)


def body_work(body: nn.Module, base: nn.Module, hf_config: Any, cut: Cut) -> BodyWork:
    """The work of a body and its base model, whose weights are whole."""
    parts = architecture(hf_config)
    last = last_feed_forward(base, hf_config)
    head = 0 if parts.body_head is None else linear_parameters(body.get_submodule(parts.body_head))
    first = cut.layers if isinstance(cut, LayersCut) else 0
    kinds = getattr(hf_config, "layer_types", None) or [None] * hf_config.num_hidden_layers
    windows = tuple(hf_config.sliding_window if kind == "sliding_attention" else None for kind in kinds[first:])
    return BodyWork(linear_parameters(base) - last, last + head, hf_config.hidden_size, windows)


def last_feed_forward(base: nn.Module, hf_config: Any) -> int:
    """Entries of matrices of the last layer behind its attention."""
    last = layers_of(base, hf_config)[-1]
    return sum(linear_parameters(last.get_submodule(name)) for name in architecture(hf_config).feed_forward)


def _seen(length: float, each_side: int | None) -> float:
    """Tokens of a sequence that a token sees in the mean, itself counted."""
    if each_side is None or each_side >= length - 1:
        return length
    return 2 * each_side + 1 - each_side * (each_side + 1) / length
