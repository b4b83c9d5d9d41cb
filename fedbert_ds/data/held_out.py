"""Text that a client keeps out of training, and its masked batch, the same in every evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from fedbert_ds.data.corpus import Item
from fedbert_ds.data.masking import Batch, Masker, Sequences
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
    check_share(len(articles), share)
    held_out = [is_kept_apart(number, share) for number in range(len(articles))]
    chosen = [article for article, is_chosen in zip(articles, held_out, strict=True) if is_chosen]
    left = [article for article, is_chosen in zip(articles, held_out, strict=True) if not is_chosen]
    return left, chosen


def check_share(articles: int, share: float) -> None:
    """DataError for one article alone, of which a share is to be held out, and for a share outside
    [0, 1).
    """
    if not 0.0 <= share < 1.0:
        raise DataError(f"a held-out share of {share} leaves nothing to train on; use at least 0 and less than 1")
    if share and articles == 1:
        raise DataError(
            "1 article cannot be both trained on and held out; give more files or a .jsonl, or add --held-out 0"
        )


def is_kept_apart(number: int, share: float) -> bool:
    """Whether the article of this number, from 0, is among the held-out ones of `keep_apart`."""
    # Counted from the second article, one is held out where a new multiple of 1 / share begins.
    place = number - 1
    return share > 0.0 and (place == 0 or (place > 0 and int(place * share) > int((place - 1) * share)))


def evaluation_batch(
    text: Sequences,
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
    masker = Masker(tokenizer, mask_probability=mask_probability, whole_word=whole_word)
    pieces = text.pieces(text.spread(max_tokens))
    input_ids, positions, labels = masker.mask_pieces(text, pieces, generator("evaluate", seed, client))
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        lengths=[piece.stop - piece.start for piece in pieces],
        masked_positions=torch.from_numpy(positions),
        labels=torch.from_numpy(labels),
    )
