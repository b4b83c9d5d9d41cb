"""A run's evaluations: every client's held-out loss; which is best, and when to stop."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedbert_ds.atomic_write import write_text
from fedbert_ds.errors import RunError

MeasuresOf = Callable[[Sequence[float]], dict[str, float]]


@dataclass(frozen=True)
class HeldOutLoss:
    """Of one client's held-out text."""

    loss_sum: float
    """Cross-entropies, nats."""
    masked_tokens: int
    """Or labels of a task."""
    counts: tuple[float, ...] = ()
    """What a task's measures are made of; they add up over texts and clients."""
    measures: Mapping[str, float] = field(default_factory=dict)
    """Of a task, by name."""

    @property
    def loss(self) -> float:
        """Nats per masked token; not a number without any."""
        return self.loss_sum / self.masked_tokens if self.masked_tokens else math.nan

    def plus(self, loss_sum: float, masked_tokens: int, counts: tuple[float, ...] = ()) -> HeldOutLoss:
        """With another part, which has as many counts."""
        added = tuple(mine + theirs for mine, theirs in zip(self.counts, counts, strict=True))
        return HeldOutLoss(self.loss_sum + loss_sum, self.masked_tokens + masked_tokens, added)


@dataclass(frozen=True)
class Evaluation:
    """The state of a run before `window`, on the text that its clients keep out of training."""

    window: int
    clients: Mapping[str, HeldOutLoss]
    """Those that have held-out text, by name."""
    missing: tuple[str, ...] = field(default=())
    """Connected clients that did not report: they were late, or lost meanwhile."""
    measures: Mapping[str, float] = field(default_factory=dict)
    """Of a task, over the examples of all clients together, by name."""

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
        told = "".join(f", {name} {value:.3f}" for name, value in self.measures.items())
        return f"held out {self.loss:.3f}, worst {self.worst} {self.clients[self.worst].loss:.3f}{told}"


def evaluation_of(
    window: int, losses: Mapping[str, HeldOutLoss], asked: Sequence[str], measures_of: MeasuresOf | None = None
) -> Evaluation:
    """From what clients reported, of those that were connected. One without held-out text is in
    neither list. `measures_of` makes a task's measures of counts.
    """
    told = {name: losses[name] for name in sorted(losses) if losses[name].masked_tokens}
    missing = tuple(sorted(set(asked) - losses.keys()))
    if measures_of is None or not told:
        return Evaluation(window, told, missing)
    measured = {name: replace(loss, measures=measures_of(loss.counts)) for name, loss in told.items()}
    together = [sum(counts) for counts in zip(*(loss.counts for loss in told.values()), strict=True)]
    return Evaluation(window, measured, missing, measures_of(together))


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
        "clients": {name: _client_row(loss) for name, loss in evaluation.clients.items()},
        "missing": list(evaluation.missing),
        **({"measures": dict(evaluation.measures)} if evaluation.measures else {}),
    }


def _client_row(loss: HeldOutLoss) -> dict[str, Any]:
    row: dict[str, Any] = {"loss_sum": loss.loss_sum, "masked_tokens": loss.masked_tokens}
    if loss.measures:
        row |= {"counts": list(loss.counts), "measures": dict(loss.measures)}
    return row | {"loss": loss.loss}


def _parsed(line: str, place: str) -> Evaluation:
    try:
        row = json.loads(line)
        clients = {
            str(name): HeldOutLoss(
                float(loss["loss_sum"]),
                int(loss["masked_tokens"]),
                tuple(map(float, loss.get("counts", ()))),
                _measures(loss),
            )
            for name, loss in row["clients"].items()
        }
        return Evaluation(int(row["window"]), clients, tuple(map(str, row["missing"])), _measures(row))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunError(f"{place}: not a line of evaluations; remove it or start another run directory") from error


def _measures(row: Mapping[str, Any]) -> dict[str, float]:
    return {str(name): float(value) for name, value in row.get("measures", {}).items()}
