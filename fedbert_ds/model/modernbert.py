"""ModernBERT's encoder over packed tokens (Warner et al. 2024, "Smarter, Better, Faster, Longer").

Its positions are rotations of queries and keys, which restart at each sequence. Its layers are
transformers' own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.modernbert.modeling_modernbert import ModernBertEncoderLayer, ModernBertRotaryEmbedding

from fedbert_ds.model.attention import Packing
from fedbert_kernels.recompute import cheap, consume


def encode_with_rotary(
    base: Any, hf_config: Any, hidden: Tensor, packing: Packing, masked_positions: Tensor | None
) -> Tensor:
    """As `encoder.encode`: ModernBertModel.forward without embeddings, padding and masks."""
    positions = packing.positions.unsqueeze(0)
    rotations = {kind: base.rotary_emb(hidden, positions, kind) for kind in sorted(set(hf_config.layer_types))}
    for kind, layer in zip(hf_config.layer_types, base.layers, strict=True):
        hidden = layer(hidden, position_embeddings=rotations[kind], packing=packing, masked_positions=masked_positions)
    return hidden if base.final_norm is None else base.final_norm(hidden)


class ExactRotary(ModernBertRotaryEmbedding):
    """Rotary angles whose frequencies stay fp32 when the model moves to another dtype.

    In bf16 they have 8 bits: a thousand tokens on, an angle would be wrong by whole radians.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            self._buffers[name] = _at(buffer, self._buffers[name])
        return self


def _at(exact: Tensor, moved: Tensor | None) -> Tensor | None:
    """`exact` where `moved` is."""
    if moved is None or moved.dtype == exact.dtype:
        return moved
    return torch.empty_like(exact, device=moved.device) if exact.is_meta else exact.to(moved.device)


class LastLayer(ModernBertEncoderLayer):
    """An encoder layer behind whose attention only masked positions go on.

    Made of a layer by its `__class__`. The residual is added outside the attention, so that a hook
    on this, as BERT has, would leave too much.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Any = None,
        **keywords: Any,
    ) -> Tensor:
        """[1, m, H] for `hidden_states` [1, T, H] and the keyword `masked_positions` [m] int64."""
        normed = self.attn_norm(hidden_states)
        attended, _ = self.attn(normed, position_embeddings=position_embeddings, **keywords)
        residual, attended = (rows.index_select(1, keywords["masked_positions"]) for rows in (hidden_states, attended))
        kept = residual + attended
        return kept + self.mlp(self.mlp_norm(kept))


def recompute_gated(layer: nn.Module) -> None:
    """Let backward compute a layer's activation and its product with the gate again.

    Comes with `Body.recompute("elementwise")`, which does so for the activation and the products'
    inputs. What dropout leaves is kept. Layers of the other half are left as they are.
    """
    if isinstance(layer, ModernBertEncoderLayer):
        layer.mlp.forward = MethodType(_gated, layer.mlp)  # type: ignore[method-assign]


def _gated(mlp: Any, hidden: Tensor) -> Tensor:
    entering, gate = mlp.Wi(hidden).chunk(2, dim=-1)
    return mlp.Wo(mlp.drop(cheap(partial(consume, torch.mul), mlp.act(entering), gate)))
