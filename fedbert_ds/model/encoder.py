"""The encoder layers that one half holds, over packed tokens, whatever model they are of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedbert_ds.model.architecture import architecture, layers_of, position_offset
from fedbert_ds.model.attention import Packing
from fedbert_kernels.recompute import cheap


def encode(base: Any, hf_config: Any, hidden: Tensor, packing: Packing, masked_positions: Tensor | None = None) -> Any:
    """Hidden states [1, T, H] for what the embeddings or the layers before gave, [1, T, W].

    `base` is a half's base model. With `masked_positions`, [m] int64, and after
    `keep_masked_positions`, [1, m, H].
    """
    if architecture(hf_config).turns_by_position:
        from fedbert_ds.model.modernbert import encode_with_rotary

        return encode_with_rotary(base, hf_config, hidden, packing, masked_positions)
    if getattr(base, "embeddings_project", None) is not None:
        hidden = base.embeddings_project(hidden)
    layers = base.transformer if architecture(hf_config).kind == "distilbert" else base.encoder
    return layers(hidden, packing=packing, masked_positions=masked_positions).last_hidden_state


def position_ids(hf_config: Any, packing: Packing) -> dict[str, Tensor]:
    """Arguments for `embeddings` that say where tokens are; none where layers know it."""
    if architecture(hf_config).turns_by_position:
        return {}
    return {"position_ids": packing.positions.unsqueeze(0) + position_offset(hf_config)}


def keep_masked_positions(base: nn.Module, hf_config: Any) -> None:
    """Let only masked positions go on after the last layer's attention, as tokens no longer meet.

    `encode` then needs `masked_positions`.
    """
    last, kind = layers_of(base, hf_config)[-1], architecture(hf_config).kind
    # A layer of another class keeps its weights and their names.
    if kind == "modernbert":
        from fedbert_ds.model import modernbert

        last.__class__ = modernbert.LastLayer
    elif kind == "distilbert":
        from fedbert_ds.model import distilbert

        last.__class__ = distilbert.LastLayer
    else:
        last.attention.register_forward_hook(_select, with_kwargs=True)


def keep_angles_exact(base: nn.Module) -> None:
    """Let rotary positions, where a half has them, be exact in any dtype."""
    if getattr(base, "rotary_emb", None) is not None:
        from fedbert_ds.model.modernbert import ExactRotary

        base.rotary_emb.__class__ = ExactRotary


def recompute_gates(layers: nn.ModuleList, hf_config: Any) -> None:
    """Let backward compute results of gates again, beside what `Body.recompute` says."""
    if architecture(hf_config).turns_by_position:
        from fedbert_ds.model.modernbert import recompute_gated

        for layer in layers:
            recompute_gated(layer)


def _select(module: nn.Module, inputs: Any, keywords: dict[str, Any], output: Any) -> Any:
    attended, *rest = output
    return cheap(torch.index_select, attended, 1, keywords["masked_positions"]), *rest
