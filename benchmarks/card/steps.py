"""What is measured on a card, in which order, and how long each may take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """A question to the card, answered in a process of its own."""

    name: str
    question: str
    share: float
    """Of the time, beside the other steps'."""


STEPS = (
    Step("facts", "what the card reaches at best", 2),
    Step("waits", "what the engine waits for, and what of a window the card computes", 14),
    Step("attention", "attention beside its rivals", 10),
    Step("body", "the body beside its rivals", 15),
    Step("end to end", "a run with clients, through the launcher", 13),
    Step("tests", "the tests of what runs on a card alone", 14),
)
"""What tells most comes first: a loan may end early."""


LEAST_SECONDS = 45.0
"""For a step to start and tell anything at all."""


def allowance(steps: Sequence[Step], seconds_left: float) -> float:
    """Seconds for the first of the steps that are left; what it leaves over is the others'."""
    share = seconds_left * steps[0].share / sum(step.share for step in steps)
    return max(0.0, min(seconds_left, max(share, LEAST_SECONDS)))
