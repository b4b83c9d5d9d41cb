"""BERT's published sizes: BERT-base and BERT-large, and the smaller ones of Turc et al."""

from __future__ import annotations

from dataclasses import dataclass

POSITIONS = 512
"""Rows of BERT's position table."""


@dataclass(frozen=True)
class Size:
    """A published BERT; its feed-forward layers are four times as wide as the others."""

    layers: int
    hidden: int
    sequence_length: int
    """Tokens of the longest sequence: short ones for small models, which are for short tries."""

    @property
    def heads(self) -> int:
        """Attention heads: BERT's are 64 wide."""
        return self.hidden // 64

    @property
    def initializer_range(self) -> float:
        """BERT's 0.02 at width 768; narrower models learn sooner with more."""
        return round(0.02 * max(1.0, (768 / self.hidden) ** 0.5), 4)


SIZES = {
    "tiny": Size(2, 128, 128),
    "mini": Size(4, 256, 128),
    "small": Size(4, 512, 128),
    "medium": Size(8, 512, 128),
    "base": Size(12, 768, POSITIONS),
    "large": Size(24, 1024, POSITIONS),
}
"""Devlin et al. 2019; tiny to medium are of Turc et al. 2019, "Well-Read Students Learn Better"."""
