"""DistilBERT's last layer over packed tokens (Sanh et al. 2019, "DistilBERT, a distilled version of
BERT"). Its other layers are transformers' own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.distilbert.modeling_distilbert import TransformerBlock


class LastLayer(TransformerBlock):
    """A layer behind whose attention only masked positions go on.

    Made of a layer by its `__class__`. The residual is added outside the attention, so that a hook
    on this, as BERT has, would leave too much.
    """

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **keywords: Any) -> Tensor:
        """[1, m, H] for `hidden_states` [1, T, H] and the keyword `masked_positions` [m] int64."""
        attended, _ = self.attention(hidden_states, **keywords)
        residual, attended = (rows.index_select(1, keywords["masked_positions"]) for rows in (hidden_states, attended))
        kept = self.sa_layer_norm(attended + residual)
        return self.output_layer_norm(self.ffn(kept) + kept)
