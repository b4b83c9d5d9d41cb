"""Packed input, and what the whole model says of it: the reference the halves are held against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedbert_ds.config import ModelSection
from fedbert_ds.model.architecture import architecture as parts_of
from fedbert_ds.model.architecture import words_of

VOCABULARY = 61
FROM_SCRATCH = ("bert", "roberta", "electra", "distilbert", "modernbert")
"""Architectures that a run file can ask for without a checkpoint."""
PAD = 1


@dataclass(frozen=True)
class Packed:
    """Sequences one after another, with the positions asked back and their labels."""

    input_ids: Tensor
    lengths: list[int]
    masked: Tensor
    labels: Tensor

    @property
    def cu_seqlens(self) -> Tensor:
        return torch.tensor([0, *self.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def small_section(architecture: str, **changes: Any) -> ModelSection:
    """Three layers, 16 wide (ELECTRA's embeddings 8), by default without dropout."""
    fields: dict[str, Any] = {
        "architecture": architecture,
        "num_hidden_layers": 3,
        "hidden_size": 16,
        "embedding_size": 8 if architecture == "electra" else None,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "dropout": 0.0,
    }
    if architecture == "modernbert":
        # Windows shorter than sequences, in the second layer of three.
        fields |= {"local_attention": 4, "global_attention_every": 2}
    return ModelSection(**(fields | changes))


def word_table(half: Any) -> Tensor:
    """The weights of a half's word table, [V, W]."""
    return words_of(half.get_submodule(parts_of(half.config).base), half.config).weight


def pack(lengths: list[int], vocabulary: int = VOCABULARY, seed: int = 0) -> Packed:
    """Random tokens, few enough kinds that rows repeat; every third position is masked."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = sum(lengths)
    return Packed(
        input_ids=torch.randint(3, min(vocabulary, 12), (num_tokens,), generator=generator),
        lengths=lengths,
        masked=torch.arange(0, num_tokens, 3),
        labels=torch.randint(3, vocabulary, (len(range(0, num_tokens, 3)),), generator=generator),
    )


def padded_logits(model: Any, packed: Packed) -> Tensor:
    """The whole model's scores at the masked positions, [m, V].

    Run on a padded batch with an attention mask.
    """
    longest = max(packed.lengths)
    rows = packed.input_ids.split(packed.lengths)
    # Any id but padding's: RoBERTa skips padding when it counts positions, as it should.
    batch = torch.full((len(rows), longest), PAD)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for index, row in enumerate(rows):
        batch[index, : len(row)] = row
        mask[index, : len(row)] = 1
    logits = model(batch, attention_mask=mask).logits
    return logits[mask.bool()][packed.masked]
