"""The client's half: embeddings (and lower layers, if the cut says so) and the head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from fedbert_ds.config import Cut, LayersCut
from fedbert_ds.model.architecture import (
    Widths,
    architecture,
    linear_parameters,
    longest_sequence,
    tells_texts_apart,
    widths,
    words_of,
)
from fedbert_ds.model.attention import PACKED_ATTENTION, Packing
from fedbert_ds.model.encoder import encode, keep_angles_exact, keep_masked_positions, position_ids
from fedbert_ds.model.flops import last_feed_forward
from fedbert_ds.model.word_table import WordTable, decoder_backward
from fedbert_ds.tasks.registry import task_of


@dataclass(frozen=True)
class Activations:
    """A client's output for T tokens; `values` keeps its graph, for `values.backward(gradient)`."""

    values: Tensor
    """[T, W]; with the cut `rows` [R, W], each distinct row of the word table once."""
    row_index: Tensor | None = None
    """[T] int32 into `values` with the cut `rows`, else None."""


class ClientHalf(nn.Module):
    """A masked LM or a classifier without its body, or with the cut `whole` all of it.

    Made by `cut.split`, `cut.undivided` or `cut.client_skeleton`.

    Parameters keep their names of the Hugging Face checkpoint. Tied tensors (the decoder is the
    word table) are one parameter and appear once in `state_dict()`, under the table's name.
    """

    def __init__(self, model: PreTrainedModel, cut: Cut) -> None:
        super().__init__()
        self.config = model.config
        self.config._attn_implementation = PACKED_ATTENTION
        self.cut = cut
        self.task = task_of(model.config)
        """What its head learns; None for masked words."""
        self._parts = architecture(model.config)
        self._ties = dict(model.all_tied_weights_keys)
        # A tied tensor is named by the first module that has it: CamemBERT has its head first.
        for name, module in sorted(model.named_children(), key=lambda child: child[0] != self._parts.base):
            self.add_module(name, module)
        base: Any = self.get_submodule(self._parts.base)
        keep_angles_exact(base)
        if cut == "whole":
            keep_masked_positions(base, self.config)
        # It keeps its weight and its name.
        words_of(base, self.config).__class__ = WordTable
        self.tie()

    def embed(self, input_ids: Tensor, lengths: Sequence[int], token_types: Tensor | None = None) -> Activations:
        """Activations of packed tokens: `input_ids` [T] int64, in sequences of `lengths`.

        `token_types` [T] int64 says which of two texts a token is of, None that all are of the
        first; models that do not tell them apart leave it aside. Positions restart at each
        sequence. ValueError if the lengths do not fit T, or a sequence is longer than the position
        table.
        """
        packing = self._packing(input_ids, lengths)
        base: Any = self.get_submodule(self._parts.base)
        if self.cut == "rows":
            rows, row_index = _distinct_by_first_appearance(input_ids)
            return Activations(words_of(base, self.config)(rows), row_index.to(torch.int32))
        hidden = self._embeddings(base, input_ids, packing, token_types)
        if isinstance(self.cut, LayersCut):
            hidden = encode(base, self.config, hidden, packing)
        return Activations(hidden.squeeze(0))

    def whole_backward(
        self,
        input_ids: Tensor,
        lengths: Sequence[int],
        masked_positions: Tensor,
        labels: Tensor,
        scale: float,
        token_types: Tensor | None = None,
    ) -> float:
        """Sum of the losses of the whole model, cross-entropies in nats; parameters' gradients of
        scale * sum accumulate.

        Arguments as of `whole_hidden` and `head_backward`.
        """
        hidden = self.whole_hidden(input_ids, lengths, masked_positions, token_types)
        loss_sum, gradient = self.head_backward(hidden, labels, scale)
        hidden.backward(gradient.to(hidden.dtype))
        return loss_sum

    def whole_hidden(
        self,
        input_ids: Tensor,
        lengths: Sequence[int],
        masked_positions: Tensor,
        token_types: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [m, W_out] of `masked_positions`, [m] int64; m may be 0.

        With the cut `whole` alone. Packed tokens as in `embed`.
        """
        packing = self._packing(input_ids, lengths)
        base: Any = self.get_submodule(self._parts.base)
        hidden = self._embeddings(base, input_ids, packing, token_types)
        hidden = encode(base, self.config, hidden, packing, masked_positions).squeeze(0)
        if self._parts.body_head is not None:
            hidden = self.get_submodule(self._parts.body_head)(hidden)
        return hidden

    def _packing(self, input_ids: Tensor, lengths: Sequence[int]) -> Packing:
        if sum(lengths) != input_ids.shape[0]:
            raise ValueError(f"lengths sum to {sum(lengths)}, but there are {input_ids.shape[0]} tokens")
        packing = Packing.from_lengths(lengths, input_ids.device)
        if packing.max_length > longest_sequence(self.config):
            raise ValueError(
                f"a sequence of {packing.max_length} tokens is longer than the position table, "
                f"{longest_sequence(self.config)}"
            )
        return packing

    def _embeddings(self, base: Any, input_ids: Tensor, packing: Packing, token_types: Tensor | None) -> Any:
        kinds = {}
        if token_types is not None and tells_texts_apart(self.config):
            kinds["token_type_ids"] = token_types.unsqueeze(0)
        return base.embeddings(input_ids=input_ids.unsqueeze(0), **kinds, **position_ids(self.config, packing))

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores [m, V] of the vocabulary, or [m, K] of a task's labels, for hidden states
        [m, W_out].
        """
        if self._parts.head_takes_sequences:
            hidden = hidden.unsqueeze(1)
        for name in self._parts.heads:
            hidden = self.get_submodule(name)(hidden)
            if name in self._parts.rectified:
                hidden = hidden.relu()
        return hidden

    def head_backward(
        self, hidden: Tensor, labels: Tensor, scale: float, chunk_size: int = 512, fused: bool | None = None
    ) -> tuple[float, Tensor]:
        """Sum of cross-entropies in nats, and d(scale * sum)/d(hidden), [m, W_out] of the half's
        dtype.

        `hidden` is [m, W_out], any floating dtype; `labels` is [m] int64; m may be 0. Parameters'
        gradients of scale * sum accumulate. Scores of all positions never exist at once. `fused`
        (default on a GPU) runs decoder and loss as one operator with a fixed buffer. Otherwise each
        chunk of `chunk_size` positions goes forward and backward before the next. A task has its
        own losses and kind of labels, and few enough scores for one piece.
        """
        hidden = hidden.detach().to(next(self.parameters()).dtype)
        if self.task is not None:
            of_labels = self.task.losses(self.logits(hidden.requires_grad_()), labels)
            (of_labels.sum() * scale).backward()
            assert hidden.grad is not None
            return _sum([of_labels.detach()]), hidden.grad
        if hidden.is_cuda if fused is None else fused:
            return self._fused_head_backward(hidden.requires_grad_(), labels, scale)
        decoder: Any = self.get_submodule(self._parts.decoder)
        losses: list[Tensor] = []
        gradients: list[Tensor] = []
        for rows, targets in zip(hidden.split(chunk_size), labels.split(chunk_size), strict=True):
            rows = rows.detach().requires_grad_()
            with _passing_on(decoder):
                decoded = self.logits(rows)
            loss, gradient = decoder_backward(decoded.detach(), decoder.weight, decoder.bias, targets, scale)
            decoded.backward(gradient)
            losses.append(loss)
            assert rows.grad is not None
            gradients.append(rows.grad)
        return _sum(losses), torch.cat(gradients)

    def _fused_head_backward(self, hidden: Tensor, labels: Tensor, scale: float) -> tuple[float, Tensor]:
        from fedbert_kernels.linear_cross_entropy import linear_cross_entropy

        decoder: Any = self.get_submodule(self._parts.decoder)
        with _passing_on(decoder):
            decoded = self.logits(hidden)
        loss = linear_cross_entropy(decoded, decoder.weight, decoder.bias, labels)
        loss.backward(torch.full_like(loss, scale))
        assert hidden.grad is not None
        return loss.item(), hidden.grad

    @torch.no_grad()
    def head_loss(self, hidden: Tensor, labels: Tensor, chunk_size: int = 512) -> float:
        """The sum of `head_backward`, with no gradient."""
        dtype = next(self.parameters()).dtype
        losses_of = self._cross_entropies if self.task is None else self.task.losses
        return _sum(
            [
                losses_of(self.logits(rows.to(dtype)), targets)
                for rows, targets in zip(hidden.split(chunk_size), labels.split(chunk_size), strict=True)
            ]
        )

    @torch.no_grad()
    def head_counts(self, hidden: Tensor, labels: Tensor, bounds: Sequence[int]) -> list[float]:
        """What a task's `measures` take, of hidden states [m, W_out] and labels [m]; none for a
        masked LM. `bounds` [n + 1] divide the m positions into sequences.
        """
        if self.task is None:
            return []
        return self.task.counts(self.logits(hidden.to(next(self.parameters()).dtype)), labels, bounds)

    @staticmethod
    def _cross_entropies(scores: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(scores, labels, reduction="none")

    @property
    def widths(self) -> Widths:
        """Widths of the activations it makes and the hidden states its head takes."""
        return widths(self.config, self.cut)

    @property
    def num_counts(self) -> int:
        """Length of `head_counts`."""
        return 0 if self.task is None else self.task.num_counts

    @property
    def num_parameters(self) -> int:
        """Entries of all parameters, tied ones counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def parameter_scope(self, name: str) -> Literal["embeddings", "head"]:
        """A parameter's part of the half; tied tables and lower layers count as embeddings."""
        name = self._ties.get(name, name)
        return "head" if any(name.startswith(f"{part}.") for part in self._parts.heads) else "embeddings"

    def flops_per_token(self, mask_share: float) -> float:
        """Floating-point operations of forward and backward per token.

        `mask_share` of the tokens reach the head. Matrix products only, 6 per matrix entry;
        attention scores are left out. With the cut `whole` the last layer's feed-forward runs for
        masked positions only.
        """
        base: Any = self.get_submodule(self._parts.base)
        per_masked = sum(linear_parameters(self.get_submodule(name)) for name in self._parts.heads)
        # A pooler is in the base, and of the head.
        pooled = [name for name in self._parts.heads if name.startswith(f"{self._parts.base}.")]
        per_token = linear_parameters(base) - sum(linear_parameters(self.get_submodule(name)) for name in pooled)
        if self.cut == "whole":
            moved = last_feed_forward(base, self.config)
            per_token, per_masked = per_token - moved, per_masked + moved
            if self._parts.body_head is not None:
                per_masked += linear_parameters(self.get_submodule(self._parts.body_head))
        return 6.0 * (per_token + mask_share * per_masked)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's, with each tied tensor once."""
        state = super().state_dict(*args, **kwargs)
        for alias in self._ties:
            state.pop(kwargs.get("prefix", "") + alias, None)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's; tied tensors may come once or under all their names, and stay tied."""
        tied = {alias: state_dict[source] for alias, source in self._ties.items() if source in state_dict}
        result = super().load_state_dict({**state_dict, **tied}, strict=strict, assign=assign)
        self.tie()
        return result

    def tie(self) -> None:
        """Make tied tensors one parameter again, after parameters were replaced."""
        for alias, source in self._ties.items():
            module_name, _, parameter_name = alias.rpartition(".")
            setattr(self.get_submodule(module_name), parameter_name, self.get_parameter(source))


@contextmanager
def _passing_on(module: nn.Module) -> Iterator[None]:
    """Let the module return its input: RoBERTa's head calls its decoder itself."""
    module.forward = lambda given: given
    try:
        yield
    finally:
        del module.forward


def _distinct_by_first_appearance(input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct ids [R] in order of first appearance, and each token's index among them [T]; int64.

    torch.unique sorts. On the wire, order would tell which of two rows has the larger id, and ids
    go by frequency.
    """
    ids, inverse = input_ids.unique(return_inverse=True)
    tokens = torch.arange(len(input_ids), device=input_ids.device)
    first = torch.full_like(ids, len(input_ids)).scatter_reduce_(0, inverse, tokens, "amin")
    order = first.argsort()
    return ids[order], order.argsort()[inverse]


def _sum(losses: Sequence[Tensor]) -> float:
    # One transfer for all chunks. fp64 on the CPU, as not every device has it.
    return torch.cat(list(losses)).cpu().double().sum().item()
