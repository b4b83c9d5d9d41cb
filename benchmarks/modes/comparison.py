"""Runs of several systems on the same batches, side by side: rows, final figures, a table and a picture.

Knows nothing of how the runs were made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle
from pathlib import Path
from typing import Any

from fedbert_ds.errors import RunError
from fedbert_ds.telemetry.metrics import WindowMetrics, summary
from fedbert_ds.telemetry.report import smoothed

LAST_SHARE = 20
"""The training loss at the end is the mean over this fraction (1/20) of the windows, the last ones."""


@dataclass(frozen=True)
class System:
    """A way to train: a federated mode, or centralized."""

    name: str
    average_every: int | None = None
    """Windows between averages; None where weights are not averaged."""
    staleness: int = 0
    """Windows a client may begin before the exchange of earlier ones is done."""

    @property
    def label(self) -> str:
        """For a reader."""
        every = f", average every {self.average_every}" if self.average_every else ""
        return f"{self.name}{every}" + (f", staleness {self.staleness}" if self.staleness else "")

    @property
    def slug(self) -> str:
        """For a file name."""
        every = f"-{self.average_every}" if self.average_every else ""
        return f"{self.name}{every}" + (f"-stale-{self.staleness}" if self.staleness else "")


@dataclass(frozen=True)
class Run:
    """A system's finished run."""

    system: System
    windows: Sequence[WindowMetrics]
    held_out_loss: float
    """Masked-LM loss of the final model on held-out articles, nats."""
    unigram_loss: float
    """The same targets from the training text's word frequencies alone, nats."""
    seconds: float
    """From the start of its processes to the end of the last, start-up included."""
    commit: str | None
    weight_difference: float = 0.0
    """Largest difference of a weight of the final model to the baseline's, attention key biases apart."""


def check_same_batches(runs: Sequence[Run]) -> None:
    """RunError unless every run had the same windows: tokens and masked tokens of each, and the held-out text."""
    first = runs[0]
    for run in runs[1:]:
        if run.unigram_loss != first.unigram_loss:
            raise RunError(f"{run.system.label}: not the held-out text of {first.system.label}; run both anew")
        if len(run.windows) != len(first.windows):
            raise RunError(
                f"{run.system.label}: {len(run.windows)} windows, {first.system.label} has {len(first.windows)}"
            )
        for mine, theirs in zip(run.windows, first.windows, strict=True):
            if (mine.tokens, mine.masked_tokens) != (theirs.tokens, theirs.masked_tokens):
                raise RunError(
                    f"{run.system.label}: window {mine.window} had {mine.tokens} tokens, {mine.masked_tokens} of them "
                    f"masked; {first.system.label} had {theirs.tokens} and {theirs.masked_tokens}"
                )


def rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row per system and window; `tokens` are all those trained on so far, this window's included."""
    return [
        {
            "system": run.system.name,
            "average_every": run.system.average_every,
            "staleness": run.system.staleness,
            "window": metrics.window,
            "tokens": tokens,
            "loss": metrics.loss,
        }
        for run in runs
        for metrics, tokens in zip(run.windows, accumulate(row.tokens for row in run.windows), strict=True)
    ]


def final(runs: Sequence[Run], baseline: str) -> list[dict[str, Any]]:
    """One row per system; differences are to the run of the system named `baseline`."""
    reference = _find(runs, baseline)
    return [_final(run, reference) for run in runs]


def table(final_rows: Sequence[Mapping[str, Any]], baseline: str) -> str:
    """The final rows as a Markdown table."""
    lines = [
        f"| system | training loss, end | held-out loss | above {baseline} | largest difference: a window's loss "
        "| a weight, at the end | bytes per token: activations and gradients | keeping halves together |",
        "| --- | --: | --: | --: | --: | --: | --: | --: |",
        f"| word frequency alone | | {final_rows[0]['unigram_loss']:.3f} | | | | | |",
    ]
    for row in final_rows:
        label = System(row["system"], row["average_every"], row.get("staleness", 0)).label
        losses = f"| {label} | {row['training_loss']:.3f} | {row['held_out_loss']:.3f} |"
        if row["system"] == baseline:
            lines.append(f"{losses} | | | | |")
            continue
        halves = row["bytes_per_token_averaging"]
        rest = row["bytes_per_token"] - halves
        lines.append(
            f"{losses} {_signed(row['held_out_difference'])} | {_significant(row['largest_difference'])} | "
            f"{_significant(row['largest_weight_difference'])} | {rest:,.0f} | {halves:,.0f} |"
        )
    return "\n".join(lines)


def draw(path: Path, runs: Sequence[Run], baseline: str) -> None:
    """Training loss against tokens, smoothed, a line per system; below it the difference to the baseline."""
    # The figure is built without pyplot: no global state, and no display is looked for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(8, 7), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    losses, differences = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    reference = smoothed(_find(runs, baseline).windows)
    colors = cycle(_COLORS)
    for run in runs:
        tokens = list(accumulate(row.tokens for row in run.windows))
        curve = smoothed(run.windows)
        label = f"{run.system.label}: held out {run.held_out_loss:.2f}"
        # Wide and pale below, so that a line that lies on it is seen to lie on it.
        style: dict[str, Any] = {"color": "#c9c9c9", "linewidth": 5.0}
        if run.system.name != baseline:
            style = {"color": next(colors), "linewidth": 1.4}
        losses.plot(tokens, curve, label=label, **style)
        differences.plot(tokens, [mine - theirs for mine, theirs in zip(curve, reference, strict=True)], **style)
    unigram = runs[0].unigram_loss
    losses.axhline(
        unigram, color="#6b6b6b", linewidth=1.0, linestyle="--", label=f"word frequency alone: held out {unigram:.2f}"
    )
    losses.set_ylabel("training loss, smoothed,\nnats per masked token")
    differences.set_ylabel(f"difference to {baseline},\nnats")
    differences.set_xlabel("tokens")
    differences.set_xlim(left=0)
    differences.xaxis.set_major_formatter(EngFormatter(sep=""))
    for axes in (losses, differences):
        axes.grid(color="#e4e4e4", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    losses.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _final(run: Run, reference: Run) -> dict[str, Any]:
    whole = summary(run.windows)
    last = summary(run.windows[-max(1, len(run.windows) // LAST_SHARE) :])
    largest = max(abs(mine.loss - theirs.loss) for mine, theirs in zip(run.windows, reference.windows, strict=True))
    return {
        "system": run.system.name,
        "average_every": run.system.average_every,
        "staleness": run.system.staleness,
        "windows": whole.windows,
        "tokens": whole.tokens,
        "training_loss": last.loss,
        "held_out_loss": run.held_out_loss,
        "unigram_loss": run.unigram_loss,
        "held_out_difference": run.held_out_loss - reference.held_out_loss,
        "largest_difference": largest,
        "largest_weight_difference": run.weight_difference,
        "bytes_per_token": whole.bytes_per_token,
        "bytes_per_token_up": whole.bytes_per_token_up,
        "bytes_per_token_down": whole.bytes_per_token_down,
        "bytes_per_token_averaging": whole.averaging_bytes_per_token,
        "seconds": round(run.seconds, 1),
        "seconds_in_windows": round(whole.seconds, 1),
        "commit": run.commit,
    }


def _find(runs: Sequence[Run], name: str) -> Run:
    return next(run for run in runs if run.system.name == name)


def _signed(difference: float) -> str:
    # A difference below the last digit shown has no sign.
    return f"{difference:+.3f}" if abs(difference) >= 0.0005 else "0.000"


def _significant(difference: float) -> str:
    return f"{difference:.1e}" if difference < 0.01 else f"{difference:.2f}"


_COLORS = ("#1f4e8c", "#4c7a34", "#c98a1b", "#b5482a", "#7a4c8c")
