"""What a run may ask of a client's machine: bounds that its owner sets, bounds of any sane run."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from fedbert_ds.config import Cut, LayersCut
from fedbert_ds.errors import WireError
from fedbert_ds.wire.messages import ClientSettings

MOST_WORDS = 1 << 22
MOST_LABELS = 1 << 16
MOST_LAYERS = 1000
WIDEST = 1 << 16
LONGEST_SEQUENCE = 1 << 16
"""Tokens."""
LARGEST_TOKENIZER = 64 << 20
"""Bytes."""
MOST_MASKED = 0.5
"""Share of tokens to predict: the server learns of each where it stands."""

PROCESS_BYTES = 250_000_000
"""A client's process with torch, before it has a model."""
CHUNK_ROWS = 512
"""Positions whose scores for all words exist at once (`ClientHalf.head_backward`)."""
LAYER_TENSORS = 8
"""Tensors of a token's width that a layer keeps for its backward, at the least."""
SHARE_OF_MACHINE = 0.75


def most_of_this_machine() -> int:
    """Bytes of memory that a client takes at most if its owner says nothing."""
    try:
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # Windows
        import psutil

        machine = psutil.virtual_memory().total
    return int(SHARE_OF_MACHINE * machine)


@dataclass(frozen=True)
class Limits:
    """What the owner of a client lets a run take."""

    max_tokens: int = 1 << 20
    """Tokens of this client in a window, and in an evaluation."""
    max_memory: int = field(default_factory=most_of_this_machine)
    """Bytes of this process."""


def check_settings(settings: ClientSettings, evaluate_tokens: int, limits: Limits) -> None:
    """WireError for more tokens than the owner allows, and for settings of no sane run."""
    length, share = settings.sequences.sequence_length, settings.sequences.mask_probability
    for tokens, what in (
        (settings.tokens, "of this client in a window"),
        (evaluate_tokens, "in an evaluation"),
        (settings.tokens_per_micro_batch, "in a micro-batch"),
    ):
        if not 0 <= tokens <= limits.max_tokens:
            raise WireError(
                f"the run asks for {tokens:,} tokens {what}; this client allows {limits.max_tokens:,} (--max-tokens)"
            )
    if length > LONGEST_SEQUENCE:
        raise WireError(f"the run asks for sequences of {length:,} tokens; a client takes {LONGEST_SEQUENCE:,} at most")
    if share > MOST_MASKED:
        raise WireError(f"the run predicts {100 * share:.0f} % of all tokens; a client takes {MOST_MASKED:.0%} at most")


def check_model(hf_config: Any) -> None:
    """WireError for a model of no sane run, before anything of its size is built."""
    bounds = {
        "vocab_size": MOST_WORDS,
        "num_hidden_layers": MOST_LAYERS,
        "hidden_size": WIDEST,
        "embedding_size": WIDEST,
        "intermediate_size": 8 * WIDEST,
        "hidden_dim": 8 * WIDEST,  # DistilBERT's name for it
        "max_position_embeddings": LONGEST_SEQUENCE,
        "type_vocab_size": LONGEST_SEQUENCE,
        "num_labels": MOST_LABELS,
    }
    for name, most in bounds.items():
        value = getattr(hf_config, name, 0)
        if not isinstance(value, int) or not 0 <= value <= most:
            raise WireError(f"the run's model has {name} {value}; a client takes {most:,} at most")


def least_memory(parameters: int, hf_config: Any, cut: Cut, settings: ClientSettings) -> int:
    """Bytes that a client needs at the least: its half, its optimizer, one piece on its way.

    `parameters` are those of the half. Its own text comes on top.
    """
    copies = 2 if settings.optimizer.name == "sgd" else 4  # weights, gradients, moments
    tokens = min(settings.tokens, max(settings.tokens_per_micro_batch, settings.sequences.sequence_length))
    held = cut.layers if isinstance(cut, LayersCut) else hf_config.num_hidden_layers if cut == "whole" else 0
    width = 4 * hf_config.hidden_size
    piece = tokens * width * (2 + LAYER_TENSORS * held)
    scores = 2 * 4 * min(tokens, CHUNK_ROWS) * hf_config.vocab_size
    return PROCESS_BYTES + 4 * copies * parameters + piece + scores


def check_memory(least: int, limits: Limits) -> None:
    """WireError if a run needs more than the owner allows."""
    if least > limits.max_memory:
        raise WireError(
            f"the run needs {least / 1e9:.1f} GB of memory here at the least; this client allows "
            f"{limits.max_memory / 1e9:.1f} GB (--max-memory)"
        )


def check_peak(peak: int, limits: Limits) -> None:
    """WireError if this process has held more than the owner allows; `peak` is in bytes."""
    if peak > limits.max_memory:
        raise WireError(
            f"this process has held {peak / 1e9:.1f} GB of memory, over {limits.max_memory / 1e9:.1f} GB "
            "(--max-memory); it leaves the run"
        )
