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

from fedbert_ds.config import Cut
from fedbert_ds.model.architecture import (
    Widths,
    architecture,
    layers_of,
    longest_sequence,
    widths,
)
from fedbert_ds.model.attention import PACKED_ATTENTION, Attend, Packing
from fedbert_ds.model.encoder import encode, keep_angles_exact, keep_masked_positions, position_ids, recompute_gates
from fedbert_ds.model.flops import BodyWork, body_work
from fedbert_kernels.recompute import cheap, cheap_in_codes, consume, recomputing

Recomputed = Literal["none", "elementwise", "attention", "int8", "layers"]
"""What backward computes again; see `Body.recompute`."""
CODES = "int8_group"
"""The codec of what `int8` keeps in fewer bits."""


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
        keep_angles_exact(self.base)
        keep_masked_positions(self.base, self.config)

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
        codec = CODES if self.recomputed == "int8" else None
        with recomputing(codec) if self.recomputes_elementwise else nullcontext():
            return self._forward(activations, masked_positions, cu_seqlens, row_index)

    def _forward(
        self, activations: Tensor, masked_positions: Tensor, cu_seqlens: Tensor, row_index: Tensor | None
    ) -> Tensor:
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
            hidden = self.base.embeddings(input_ids=None, inputs_embeds=hidden, **position_ids(self.config, packing))
        selected = encode(self.base, self.config, hidden, packing, masked_positions).squeeze(0)
        if self._parts.body_head is not None:
            selected = self.get_submodule(self._parts.body_head)(selected)
        return selected

    @property
    def layers(self) -> Any:
        """The encoder layers, a ModuleList; layers of the client are empty places in it."""
        return layers_of(self.base, self.config)

    @property
    def base(self) -> Any:
        """The model without its head, as far as it is the server's."""
        return self.get_submodule(self._parts.base)

    def recompute(self, what: Recomputed) -> None:
        """Keep less in forward; backward computes the rest again, with the same dropout. Once only.

        `elementwise`: results of LayerNorm and GELU. `attention`: these and attention's. `int8`:
        those of `elementwise`, and what GELU takes, a layer's widest result, is kept in 8 bits, so
        that gradients are rounded. `layers`: everything but each layer's input.
        """
        self.recomputed = what
        if what == "layers":
            for layer in self.layers:
                layer.gradient_checkpointing = True
                layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        elif self.recomputes_elementwise:
            # Where `patch_modules` fuses one of these, it is read and not called.
            for module in self.modules():
                if isinstance(module, nn.LayerNorm):
                    module.forward = MethodType(_cheap_forward, module)  # type: ignore[method-assign]
                elif isinstance(module, (nn.GELU, GELUActivation)):
                    module.forward = MethodType(_cheap_gelu_forward, module)  # type: ignore[method-assign]
                elif isinstance(module, nn.Linear):
                    module.forward = MethodType(_consuming_forward, module)  # type: ignore[method-assign]
            recompute_gates(self.layers, self.config)

    @property
    def recomputes_elementwise(self) -> bool:
        """Whether backward computes LayerNorm and GELU again, and no linear layer."""
        return self.recomputed in ("elementwise", "attention", "int8")

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
        """Floating-point operations of forward and backward per token; see `BodyWork`."""
        return self.work.flops_per_token(mask_share, sequence_length)

    @property
    def work(self) -> BodyWork:
        """What a forward and backward computes."""
        return body_work(self, self.base, self.config, self.cut)


# One function for all modules, so that torch.compile knows layers as the same.


def _cheap_forward(self: nn.Module, values: Tensor) -> Tensor:
    return cheap(type(self).forward, self, values)


def _cheap_gelu_forward(self: nn.Module, values: Tensor) -> Tensor:
    return cheap_in_codes(values, type(self).forward, self, values)


def _consuming_forward(self: nn.Module, values: Tensor) -> Tensor:
    return consume(type(self).forward, self, values)
