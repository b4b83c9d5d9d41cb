"""Where the supported Hugging Face encoders keep their parts, and the widths at the cut."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from torch import nn

from fedbert_ds.config import Cut, LayersCut
from fedbert_ds.errors import ModelError
from fedbert_ds.tasks.registry import task_of


@dataclass(frozen=True)
class Architecture:
    """Attribute names inside a model of transformers with its head, and of its config."""

    base: str
    """The model without its head; holds `embeddings` and the encoder."""
    heads: tuple[str, ...]
    """The parts of the head that end in logits, in order: the client's."""
    decoder: str
    """The last layer of a masked LM's head, one row of weights and one of bias for each word
    piece."""
    body_head: str | None = None
    """Projection of hidden states before the head that belongs to the body (ELECTRA's H -> E)."""
    kind: Literal["bert", "distilbert", "modernbert"] = "bert"
    """Whose layers it has; `encoder` knows how each is run over packed tokens."""
    words: str = "word_embeddings"
    """The word table, in `embeddings`."""
    encoder: tuple[str, ...] = ("embeddings_project", "encoder")
    """Parts of the base besides `embeddings`; not every model has each."""
    layers: str = "encoder.layer"
    """The list of encoder layers, in the base."""
    after_layers: str | None = None
    """What follows the last layer, in the base: the body's."""
    feed_forward: tuple[str, ...] = ("intermediate", "output")
    """Parts of a layer behind its attention, where tokens no longer meet."""
    intermediate: str = "intermediate_size"
    """Field of the config with the width of the feed-forward."""
    dropouts: tuple[str, ...] = ("hidden_dropout_prob",)
    """Fields of the config with drop probabilities of hidden states."""
    attention_dropout: str = "attention_probs_dropout_prob"
    """Field of the config with the drop probability of attention weights."""
    is_factorized: bool = False
    """Embeddings may be narrower than layers (ELECTRA's E)."""
    heads_of_sequences: tuple[str, ...] = ("classifier",)
    """As `heads`, of a classifier of sequences."""
    heads_of_tokens: tuple[str, ...] = ("dropout", "classifier")
    """As `heads`, of a classifier of tokens."""
    rectified: tuple[str, ...] = ()
    """Parts of a head whose results go through max(0, x), which no module of the model does."""
    reads_sequences: bool = True
    """A head of sequences takes all their hidden states, and reads those of the first token."""
    head_takes_sequences: bool = False
    """This model's head does."""
    positions_after_padding: bool = False
    """The position table's rows up to that of the padding's id are unused."""

    @property
    def turns_by_position(self) -> bool:
        """Whether layers turn queries and keys by position; embeddings then know no positions."""
        return self.kind == "modernbert"


_ROBERTA = Architecture(base="roberta", heads=("lm_head",), decoder="lm_head.decoder", positions_after_padding=True)

ARCHITECTURES = {
    "bert": Architecture(
        base="bert",
        heads=("cls",),
        decoder="cls.predictions.decoder",
        heads_of_sequences=("bert.pooler", "dropout", "classifier"),
    ),
    "roberta": _ROBERTA,
    # Of other languages, with RoBERTa's modules under RoBERTa's names.
    "camembert": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "electra": Architecture(
        base="electra",
        heads=("generator_lm_head",),
        decoder="generator_lm_head",
        body_head="generator_predictions",
        is_factorized=True,
    ),
    # BERT's layers under other names, without kinds of tokens; its residuals are added outside the
    # attention.
    "distilbert": Architecture(
        base="distilbert",
        heads=("vocab_transform", "activation", "vocab_layer_norm", "vocab_projector"),
        decoder="vocab_projector",
        kind="distilbert",
        encoder=("transformer",),
        layers="transformer.layer",
        feed_forward=("ffn", "output_layer_norm"),
        intermediate="hidden_dim",
        dropouts=("dropout", "seq_classif_dropout"),
        attention_dropout="attention_dropout",
        heads_of_sequences=("pre_classifier", "dropout", "classifier"),
        rectified=("pre_classifier",),
        reads_sequences=False,
    ),
    "modernbert": Architecture(
        base="model",
        heads=("head", "decoder"),
        decoder="decoder",
        kind="modernbert",
        words="tok_embeddings",
        encoder=("rotary_emb", "layers", "final_norm"),
        layers="layers",
        after_layers="final_norm",
        feed_forward=("mlp_norm", "mlp"),
        dropouts=("embedding_dropout", "mlp_dropout"),
        attention_dropout="attention_dropout",
        heads_of_sequences=("head", "drop", "classifier"),
        heads_of_tokens=("head", "drop", "classifier"),
        reads_sequences=False,
    ),
}

REFUSED = {
    "mpnet": "its attention scores get a bias by distance, which attention of packed sequences does not take",
    "deberta": "its attention scores depend on distances, which attention of packed sequences does not take",
    "deberta-v2": "its attention scores depend on distances, which attention of packed sequences does not take",
    "albert": "its layers are one set of weights, which cannot be divided between client and server",
}
"""Encoders that users bring and our layers do not compute, each with the reason."""


class Widths(NamedTuple):
    """Widths of the two tensors that cross the cut."""

    activations: int
    """W: of activations up, and of their gradient down."""
    hidden: int
    """W_out: of masked positions' hidden states down, and of their gradient up."""


def architecture(hf_config: Any) -> Architecture:
    """The parts of a model with the head that its transformers config says; ModelError names those
    supported, and the one way to read a sequence.
    """
    model_type = getattr(hf_config, "model_type", None)
    if model_type not in ARCHITECTURES:
        reason = f" ({REFUSED[model_type]})" if model_type in REFUSED else ""
        raise ModelError(f"architecture {model_type} is not supported{reason}; use one of {', '.join(ARCHITECTURES)}")
    parts, task = ARCHITECTURES[model_type], task_of(hf_config)
    if task is None:
        return parts
    if not task.reads_first_token:
        return replace(parts, heads=parts.heads_of_tokens, decoder="", body_head=None)
    if getattr(hf_config, "classifier_pooling", "cls") != "cls":
        raise ModelError(
            f"classifier_pooling {hf_config.classifier_pooling} reads every token of a sequence; only cls is supported"
        )
    return replace(
        parts,
        heads=parts.heads_of_sequences,
        decoder="",
        body_head=None,
        head_takes_sequences=parts.reads_sequences,
    )


def widths(hf_config: Any, cut: Cut) -> Widths:
    """Widths of activations and hidden states, from the config alone.

    Clients' tensors are checked against them.
    """
    parts = architecture(hf_config)
    embedding = hf_config.embedding_size if parts.is_factorized else hf_config.hidden_size
    return Widths(
        activations=hf_config.hidden_size if isinstance(cut, LayersCut) else embedding,
        hidden=embedding if parts.body_head is not None else hf_config.hidden_size,
    )


def position_offset(hf_config: Any) -> int:
    """Index of a sequence's first row in the position table.

    RoBERTa leaves the first pad_token_id + 1 rows unused.
    """
    return hf_config.pad_token_id + 1 if ARCHITECTURES[hf_config.model_type].positions_after_padding else 0


def longest_sequence(hf_config: Any) -> int:
    """Longest sequence, in tokens, that the model has positions for."""
    return hf_config.max_position_embeddings - position_offset(hf_config)


def position_limit(model: Any) -> int:
    """Longest sequence of any encoder of transformers, by its position table, or else its config,
    or 512. RoBERTa's kind spends its first rows on padding.
    """
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return int(getattr(model.config, "max_position_embeddings", None) or 512)


def tells_texts_apart(hf_config: Any) -> bool:
    """Whether embeddings know which of two texts a token is of; others see separators alone."""
    return getattr(hf_config, "type_vocab_size", 1) > 1


def words_of(base: nn.Module, hf_config: Any) -> Any:
    """The word table of a base model."""
    return base.get_submodule(f"embeddings.{architecture(hf_config).words}")


def layers_of(base: nn.Module, hf_config: Any) -> Any:
    """The encoder layers of a base model, a ModuleList."""
    return base.get_submodule(architecture(hf_config).layers)


def feed_forward_width(hf_config: Any) -> int:
    """Width of the feed-forward of a layer."""
    return getattr(hf_config, architecture(hf_config).intermediate)


def attention_dropout(hf_config: Any) -> float:
    """Drop probability of attention weights in training."""
    return getattr(hf_config, architecture(hf_config).attention_dropout)


def linear_parameters(module: nn.Module) -> int:
    """Entries of the matrices that multiply every row a module is given.

    Embedding tables do not count: they are looked up.
    """
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))
