"""Where the three supported Hugging Face masked LMs keep their parts, and the widths at the cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from fedbert_ds.config import Cut, LayersCut
from fedbert_ds.errors import ModelError


@dataclass(frozen=True)
class Architecture:
    """Attribute names inside a `...ForMaskedLM` model of transformers."""

    base: str
    """The model without its head; holds `embeddings` and `encoder`."""
    head: str
    """The part of the masked-LM head that ends in logits: the client's."""
    decoder: str
    """The last layer of `head`, one row of weights and one of bias for each word piece."""
    body_head: str | None = None
    """Projection of hidden states before `head` that belongs to the body (ELECTRA's H -> E)."""


ARCHITECTURES = {
    "bert": Architecture(base="bert", head="cls", decoder="cls.predictions.decoder"),
    "roberta": Architecture(base="roberta", head="lm_head", decoder="lm_head.decoder"),
    "electra": Architecture(
        base="electra", head="generator_lm_head", decoder="generator_lm_head", body_head="generator_predictions"
    ),
}


class Widths(NamedTuple):
    """Widths of the two tensors that cross the cut."""

    activations: int
    """W: of activations up, and of their gradient down."""
    hidden: int
    """W_out: of masked positions' hidden states down, and of their gradient up."""


def architecture(hf_config: Any) -> Architecture:
    """The entry for a transformers config; ModelError names the supported three."""
    model_type = getattr(hf_config, "model_type", None)
    if model_type not in ARCHITECTURES:
        raise ModelError(f"architecture {model_type} is not supported; use a bert, roberta or electra masked-LM")
    return ARCHITECTURES[model_type]


def widths(hf_config: Any, cut: Cut) -> Widths:
    """Widths of activations and hidden states, from the config alone.

    Clients' tensors are checked against them.
    """
    factorized = architecture(hf_config).body_head is not None
    embedding = hf_config.embedding_size if factorized else hf_config.hidden_size
    return Widths(
        activations=hf_config.hidden_size if isinstance(cut, LayersCut) else embedding,
        hidden=embedding,
    )


def position_offset(hf_config: Any) -> int:
    """Index of a sequence's first row in the position table.

    RoBERTa leaves the first pad_token_id + 1 rows unused.
    """
    return hf_config.pad_token_id + 1 if hf_config.model_type == "roberta" else 0


def longest_sequence(hf_config: Any) -> int:
    """Longest sequence, in tokens, that the position table holds."""
    return hf_config.max_position_embeddings - position_offset(hf_config)


def linear_parameters(module: nn.Module) -> int:
    """Entries of the matrices that multiply every row a module is given.

    Embedding tables do not count: they are looked up.
    """
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))
