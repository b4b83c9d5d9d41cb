"""The server's half: transformer layers over packed sequences, masked positions' states out."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.activations import GELUActivation

from fedbert_ds.config import Cut, LayersCut
from fedbert_ds.model.architecture import (
    Widths,
    architecture,
    linear_parameters,
    longest_sequence,
    position_offset,
    widths,
)
from fedbert_ds.model.attention import PACKED_ATTENTION, Attend, Packing, keep_masked_positions
from fedbert_kernels.recompute import cheap, consume, recomputing

Recomputed = Literal["none", "elementwise", "attention", "layers"]
"""What backward computes again; see `Body.recompute`."""


class Body(nn.Module):
    """The encoder layers of a masked LM, without embeddings and head.

    Made by `cut.split` or `cut.body_skeleton`. Parameters keep their names of the Hugging Face
    checkpoint.
    """

    def __init__(self, model: PreTrainedModel, cut: Cut) -> None:
        super().__init__()
        self.config = model.config
        self.config._attn_implementation = PACKED_ATTENTION
        self.cut = cut
        self.attend: Attend | None = None
        """Attention of packed sequences, None for torch's; `kernels.install_kernels` sets it."""
        self.recomputed: Recomputed = "none"
        """What `recompute` was called with."""
        self._parts = architecture(model.config)
        for name, module in model.named_children():
            self.add_module(name, module)
        base: Any = self.get_submodule(self._parts.base)
        base.encoder.layer[-1].attention.register_forward_hook(keep_masked_positions, with_kwargs=True)

    def forward(
        self,
        activations: Tensor,
        masked_positions: Tensor,
        cu_seqlens: Tensor,
        row_index: Tensor | None = None,
    ) -> Tensor:
        """Hidden states of masked positions, [m, W_out], in the body's dtype; m may be 0.

        `activations` is [T, W]; with the cut `rows` it is [R, W], and `row_index` [T] int64 points
        into it. Any floating dtype. Gradients of equal rows are summed in fp32 or wider.
        `masked_positions` is [m] int64 into T. `cu_seqlens` is [n + 1] int32, best on the CPU.
        ValueError if these do not fit.
        """
        with recomputing() if self.recomputes_elementwise else nullcontext():
            return self._forward(activations, masked_positions, cu_seqlens, row_index)

    def _forward(
        self, activations: Tensor, masked_positions: Tensor, cu_seqlens: Tensor, row_index: Tensor | None
    ) -> Tensor:
        base: Any = self.get_submodule(self._parts.base)
        dtype = next(self.parameters()).dtype
        if self.cut == "rows":
            if row_index is None:
                raise ValueError("the cut `rows` needs row_index, one row of the activations per token")
            # Embedding, not indexing: its backward sums in fp32 in a fixed order, as the word
            # table's does.
            summed_in = torch.promote_types(activations.dtype, torch.float32)
            activations = functional.embedding(row_index, activations.to(summed_in))
        packing = Packing.from_cu_seqlens(cu_seqlens, activations.shape[0], activations.device, attend=self.attend)
        packing = replace(packing, is_recomputed=self.recomputed == "attention")
        hidden = activations.to(dtype).unsqueeze(0)
        if self.cut == "rows":
            if packing.max_length > longest_sequence(self.config):
                raise ValueError(
                    f"a sequence of {packing.max_length} tokens is longer than the position table, "
                    f"{longest_sequence(self.config)}"
                )
            positions = packing.positions.unsqueeze(0) + position_offset(self.config)
            hidden = base.embeddings(inputs_embeds=hidden, position_ids=positions)
        if getattr(base, "embeddings_project", None) is not None:
            hidden = base.embeddings_project(hidden)
        hidden = base.encoder(hidden, packing=packing, masked_positions=masked_positions).last_hidden_state
        selected = hidden.squeeze(0)
        if self._parts.body_head is not None:
            selected = self.get_submodule(self._parts.body_head)(selected)
        return selected

    @property
    def base_name(self) -> str:
        """Name of the submodule that holds the encoder."""
        return self._parts.base

    def recompute(self, what: Recomputed) -> None:
        """Keep less in forward; backward computes the rest again, with the same dropout. Once only.

        `elementwise`: results of LayerNorm and GELU. `attention`: these and attention's. `layers`:
        everything but each layer's input.
        """
        self.recomputed = what
        base: Any = self.get_submodule(self._parts.base)
        if what == "layers":
            for layer in base.encoder.layer:
                layer.gradient_checkpointing = True
                layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        elif self.recomputes_elementwise:
            # Where `patch_modules` fuses one of these, it is read and not called.
            for module in self.modules():
                if isinstance(module, (nn.LayerNorm, nn.GELU, GELUActivation)):
                    module.forward = MethodType(_cheap_forward, module)  # type: ignore[method-assign]
                elif isinstance(module, nn.Linear):
                    module.forward = MethodType(_consuming_forward, module)  # type: ignore[method-assign]

    @property
    def recomputes_elementwise(self) -> bool:
        """Whether backward computes LayerNorm and GELU again, and no linear layer."""
        return self.recomputed in ("elementwise", "attention")

    @property
    def input_dtype(self) -> torch.dtype:
        """Activations in this dtype need no copy. In a wider one the result is the same."""
        # Gradients of equal rows add up in that of the rows.
        return torch.float32 if self.cut == "rows" else next(self.parameters()).dtype

    @property
    def widths(self) -> Widths:
        """Widths of the activations it takes and the hidden states it returns."""
        return widths(self.config, self.cut)

    @property
    def num_parameters(self) -> int:
        """Entries of all parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self, mask_share: float, sequence_length: float) -> float:
        """Floating-point operations of forward and backward per token.

        Matrix products only: 6 per matrix entry, and 12 x hidden size x sequence length a layer for
        the scores and their use. The last layer's feed-forward runs for masked positions only.
        """
        base: Any = self.get_submodule(self._parts.base)
        layers = self.config.num_hidden_layers - (self.cut.layers if isinstance(self.cut, LayersCut) else 0)
        last = base.encoder.layer[-1]
        per_masked = linear_parameters(last.intermediate) + linear_parameters(last.output)
        per_token = linear_parameters(base) - per_masked + 2 * layers * self.config.hidden_size * sequence_length
        if self._parts.body_head is not None:
            per_masked += linear_parameters(self.get_submodule(self._parts.body_head))
        return 6.0 * (per_token + mask_share * per_masked)


# One function for all modules, so that torch.compile knows layers as the same.


def _cheap_forward(self: nn.Module, values: Tensor) -> Tensor:
    return cheap(type(self).forward, self, values)


def _consuming_forward(self: nn.Module, values: Tensor) -> Tensor:
    return consume(type(self).forward, self, values)
