"""Text that a client keeps out of training, and its masked batch, the same in every evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedbert_ds.data.corpus import Item
from fedbert_ds.data.masking import Batch, EncodedText, Masker
from fedbert_ds.errors import DataError
from fedbert_ds.seeding import generator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def keep_apart(articles: Sequence[Item], share: float) -> tuple[list[Item], list[Item]]:
    """Split a client's text into (trained on, held out), both in order; with share 0 none is held
    out.

    The second article is held out, and then about every (1 / share)th. So the text stays divided as
    it is when more is added behind it, and a part of every source is held out.

    DataError for one article alone, and for a share outside [0, 1).
    """
    if not 0.0 <= share < 1.0:
        raise DataError(f"a held-out share of {share} leaves nothing to train on; use at least 0 and less than 1")
    if share == 0.0:
        return list(articles), []
    if len(articles) == 1:
        raise DataError(
            "1 article cannot be both trained on and held out; give more files or a .jsonl, or add --held-out 0"
        )
    # Counted from the second article, one is held out where a new multiple of 1 / share begins.
    held_out = [place == 0 or int(place * share) > int((place - 1) * share) for place in range(len(articles) - 1)]
    chosen = [article for article, is_chosen in zip(articles[1:], held_out, strict=True) if is_chosen]
    left = [article for article, is_chosen in zip(articles[1:], held_out, strict=True) if not is_chosen]
    return [articles[0], *left], chosen


def evaluation_batch(
    text: EncodedText,
    tokenizer: PreTrainedTokenizerFast,
    *,
    mask_probability: float,
    whole_word: bool,
    seed: int,
    client: str,
    max_tokens: int,
) -> Batch:
    """Sequences of the held-out text, spread evenly over it, that together have about `max_tokens`
    tokens at most; at least one.

    Masks follow from `seed`, `client` and the text alone, so that every evaluation predicts the
    same tokens.
    """
    input_ids, positions, labels = Masker(tokenizer, mask_probability=mask_probability, whole_word=whole_word).mask(
        text.tokens.numpy(), text.word_starts.numpy(), generator("evaluate", seed, client)
    )
    targets = np.full(len(input_ids), -1, dtype=np.int64)
    targets[positions] = labels
    pieces = text.pieces(text.spread(max_tokens))
    read = np.concatenate([targets[piece] for piece in pieces])
    return Batch(
        input_ids=torch.from_numpy(np.concatenate([input_ids[piece] for piece in pieces])),
        lengths=[piece.stop - piece.start for piece in pieces],
        masked_positions=torch.from_numpy(np.flatnonzero(read >= 0).astype(np.int64)),
        labels=torch.from_numpy(read[read >= 0]),
    )
