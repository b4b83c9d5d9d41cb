"""How alike the rows of a word table are, which a held-out loss does not tell."""

from __future__ import annotations

from torch import Tensor


def mean_cosine(table: Tensor) -> float:
    """Mean cosine of two different rows of [V, H], any float dtype: about 0 where they point
    everywhere, 1 where all point one way.

    Ethayarajh 2019, "How Contextual are Contextualized Word Representations?", section 4.1, of word
    vectors as they are. Rows of zeros, such as padding's, are left out. NaN where a row is not
    finite. ValueError with fewer than two others.
    """
    rows = table.detach().double()
    lengths = rows.norm(dim=1)
    is_used = lengths != 0  # of NaN, too: a run that diverged has a figure, and no error
    rows = rows[is_used] / lengths[is_used, None]
    if len(rows) < 2:
        raise ValueError(f"a table of {len(table)} rows has no two that are not zero")
    # The square of the sum holds each pair twice, and each row with itself once, as 1.
    return float((rows.sum(dim=0).square().sum() - len(rows)) / (len(rows) * (len(rows) - 1)))
