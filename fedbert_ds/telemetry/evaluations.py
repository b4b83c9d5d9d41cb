"""A run's evaluations: every client's held-out loss; which is best, and when to stop."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedbert_ds.atomic_write import write_text
from fedbert_ds.errors import RunError


@dataclass(frozen=True)
class HeldOutLoss:
    """Of one client's held-out text."""

    loss_sum: float
    """Cross-entropies, nats."""
    masked_tokens: int

    @property
    def loss(self) -> float:
        """Nats per masked token; not a number without any."""
        return self.loss_sum / self.masked_tokens if self.masked_tokens else math.nan

    def plus(self, loss_sum: float, masked_tokens: int) -> HeldOutLoss:
        """With another part."""
        return HeldOutLoss(self.loss_sum + loss_sum, self.masked_tokens + masked_tokens)


@dataclass(frozen=True)
class Evaluation:
    """The state of a run before `window`, on the text that its clients keep out of training."""

    window: int
    clients: Mapping[str, HeldOutLoss]
    """Those that have held-out text, by name."""
    missing: tuple[str, ...] = field(default=())
    """Connected clients that did not report: they were late, or lost meanwhile."""

    @property
    def loss(self) -> float:
        """Mean over all masked tokens, nats; not a number without any."""
        # In order of names: the sum does not depend on who answered first.
        sums = [self.clients[name].loss_sum for name in sorted(self.clients)]
        masked = sum(loss.masked_tokens for loss in self.clients.values())
        return sum(sums) / masked if masked else math.nan

    @property
    def worst(self) -> str | None:
        """The client with the highest mean loss, the first by name among equals."""
        told = [name for name in sorted(self.clients) if self.clients[name].masked_tokens]
        return max(told, key=lambda name: self.clients[name].loss, default=None)

    @property
    def sentence(self) -> str:
        """Global mean and worst client, as one piece of a line."""
        if self.worst is None:
            return "nothing held out"
        return f"held out {self.loss:.3f}, worst {self.worst} {self.clients[self.worst].loss:.3f}"


def evaluation_of(window: int, losses: Mapping[str, HeldOutLoss], asked: Sequence[str]) -> Evaluation:
    """From what clients reported, of those that were connected. One without held-out text is in
    neither list.
    """
    told = {name: losses[name] for name in sorted(losses) if losses[name].masked_tokens}
    return Evaluation(window, told, tuple(sorted(set(asked) - losses.keys())))


def best_of(evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """The first of the lowest loss."""
    told = [evaluation for evaluation in evaluations if math.isfinite(evaluation.loss)]
    return min(told, key=lambda evaluation: evaluation.loss, default=None)


def without_improvement(evaluations: Sequence[Evaluation]) -> int:
    """Evaluations since the best one; those in which nobody told a loss do not count."""
    losses = [evaluation.loss for evaluation in evaluations if math.isfinite(evaluation.loss)]
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0


def write_evaluations(path: Path, evaluations: Sequence[Evaluation]) -> None:
    """Write all of them, whole or not at all."""
    write_text(path, "".join(json.dumps(_row(evaluation)) + "\n" for evaluation in evaluations))


def read_evaluations(path: Path) -> list[Evaluation]:
    """What `write_evaluations` wrote, none without a file; RunError if it is damaged."""
    if not path.is_file():
        return []
    return [_parsed(line, f"{path}:{n}") for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)]


def _row(evaluation: Evaluation) -> dict[str, Any]:
    worst = evaluation.worst
    return {
        "window": evaluation.window,
        "loss": None if worst is None else evaluation.loss,
        "worst_client": worst,
        "worst_loss": None if worst is None else evaluation.clients[worst].loss,
        "clients": {name: asdict(loss) | {"loss": loss.loss} for name, loss in evaluation.clients.items()},
        "missing": list(evaluation.missing),
    }


def _parsed(line: str, place: str) -> Evaluation:
    try:
        row = json.loads(line)
        clients = {
            str(name): HeldOutLoss(float(loss["loss_sum"]), int(loss["masked_tokens"]))
            for name, loss in row["clients"].items()
        }
        return Evaluation(int(row["window"]), clients, tuple(map(str, row["missing"])))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunError(f"{place}: not a line of evaluations; remove it or start another run directory") from error
