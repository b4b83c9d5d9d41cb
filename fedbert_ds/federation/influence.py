"""How large what a client sends may be: a multiple of what is typical of the clients. Pure rules.

A client's vote is the size of what it sent last. The typical size is the lower median of all votes,
so fewer than half of the clients cannot move it beyond what the others send.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Vote:
    """The size of a client's update."""

    norm: float
    """Euclidean norm of all its tensors together."""
    masked: float
    """Masked tokens behind it."""


def typical(sizes: Collection[float]) -> float:
    """The lower median; 0 of nothing."""
    return sorted(sizes)[(len(sizes) - 1) // 2] if sizes else 0.0


def most_of_changes(votes: Mapping[str, Vote], others: Mapping[str, Vote], times: float) -> dict[str, float]:
    """The largest norm of each voter's weights or change: `times` the typical one.

    `others` are the last votes of clients that send nothing now. Updates without a masked token
    have no vote.
    """
    sizes = [vote.norm for vote in {**others, **votes}.values() if vote.masked > 0]
    return dict.fromkeys(votes, times * typical(sizes))


def most_of_sums(votes: Mapping[str, Vote], others: Mapping[str, Vote], times: float) -> dict[str, float]:
    """The largest norm of each voter's gradient, a sum over its masked tokens.

    It is `times` the typical norm for each token, times the tokens. What gradients have in common
    adds up in proportion to the tokens and what they have not to their square root, so a client
    with fewer tokens than is typical may send the more for each.
    """
    counted = [vote for vote in {**others, **votes}.values() if vote.masked > 0]
    for_a_token = typical([vote.norm / vote.masked for vote in counted])
    tokens = typical([vote.masked for vote in counted])
    return {
        client: times * for_a_token * math.sqrt(vote.masked * max(vote.masked, tokens))
        for client, vote in votes.items()
    }


def shrinking(norm: float, most: float) -> float:
    """What to multiply something of this norm by, so that its norm is at most `most`; 1 if it is
    already.
    """
    return 1.0 if norm <= most else most / norm
