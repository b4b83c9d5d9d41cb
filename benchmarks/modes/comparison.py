"""Runs of several systems on the same batches as rows, final figures, a table and a picture.

Knows nothing of how the runs were made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle
from pathlib import Path
from typing import Any

from fedbert_ds.compare.runs import ClientCosts
from fedbert_ds.compare.systems import System
from fedbert_ds.errors import RunError
from fedbert_ds.telemetry.metrics import WindowMetrics, summary
from fedbert_ds.telemetry.plots import COLORS, PALE, REFERENCE, picture, short_ticks
from fedbert_ds.telemetry.report import smoothed
from fedbert_ds.telemetry.tables import markdown

LAST_SHARE = 20
"""The training loss at the end is the mean of the last 1/20 of the windows."""


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
    """Largest difference of a final weight to the baseline's, attention key biases apart."""
    client: ClientCosts | None = None


def check_same_batches(runs: Sequence[Run]) -> None:
    """RunError unless all runs had the same tokens, masked tokens and held-out text.

    Where clients take turns a window is one client's, so its batches differ by design: of such a
    run only held-out text and number of windows are checked.
    """
    first = runs[0]
    for run in runs[1:]:
        if run.unigram_loss != first.unigram_loss:
            raise RunError(f"{run.system.label}: not the held-out text of {first.system.label}; run both anew")
        if len(run.windows) != len(first.windows):
            raise RunError(
                f"{run.system.label}: {len(run.windows)} windows, {first.system.label} has {len(first.windows)}"
            )
        if run.system.takes_turns:
            continue
        for mine, theirs in zip(run.windows, first.windows, strict=True):
            if (mine.tokens, mine.masked_tokens) != (theirs.tokens, theirs.masked_tokens):
                raise RunError(
                    f"{run.system.label}: window {mine.window} had {mine.tokens} tokens, {mine.masked_tokens} of them "
                    f"masked; {first.system.label} had {theirs.tokens} and {theirs.masked_tokens}"
                )


def rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row per system and window; `tokens` are those trained on so far, with this window's."""
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

    def cells(row: Mapping[str, Any]) -> list[str]:
        label = System(row["system"], row["average_every"], row.get("staleness", 0)).label
        rate = [f"{row['learning_rate']:.1e}"] if rates else []
        losses = [label, *rate, f"{row['training_loss']:.3f}", f"{row['held_out_loss']:.3f}"]
        if row["system"] == baseline:
            return losses + [""] * (len(heads) - len(losses))
        halves = row["bytes_per_token_averaging"]
        return [
            *losses,
            _signed(row["held_out_difference"]),
            "" if row["largest_difference"] is None else _significant(row["largest_difference"]),
            _significant(row["largest_weight_difference"]),
            f"{row['bytes_per_token'] - halves:,.0f}",
            f"{halves:,.0f}",
            *(_client_costs(row) if costs else []),
        ]

    # Records of before have no costs of clients.
    costs = any(row.get("client_flops_per_token") for row in final_rows)
    rates = len({row.get("learning_rate") for row in final_rows}) > 1
    heads = ["system", *(["learning rate"] if rates else [])]
    heads += ["training loss, end", "held-out loss", f"above {baseline}"]
    heads += ["largest difference: a window's loss", "a weight, at the end"]
    heads += ["bytes per token: activations and gradients", "client updates"]
    heads += ["client FLOP per token", "client peak memory"] if costs else []
    word_frequency = [""] * len(heads)
    word_frequency[0] = "word frequency alone"
    word_frequency[heads.index("held-out loss")] = f"{final_rows[0]['unigram_loss']:.3f}"
    return markdown(heads, [word_frequency, *map(cells, final_rows)])


def draw(path: Path, runs: Sequence[Run], baseline: str) -> None:
    """Smoothed training loss against tokens, a line a system; below, the difference to baseline,
    but where clients take turns: their windows are of other text."""
    reference, colors = smoothed(_find(runs, baseline).windows), cycle(COLORS)
    with picture(path, 8, 7, rows=2, sharex=True, height_ratios=(3, 2)) as (_, (losses, differences)):
        for run in runs:
            tokens = list(accumulate(row.tokens for row in run.windows))
            curve = smoothed(run.windows)
            label = f"{run.system.label}: held out {run.held_out_loss:.2f}"
            # Wide and pale below, so that a line that lies on it is seen to lie on it.
            style: dict[str, Any] = {"color": PALE, "linewidth": 5.0}
            if run.system.name != baseline:
                style = {"color": next(colors), "linewidth": 1.4}
            losses.plot(tokens, curve, label=label, **style)
            if not run.system.takes_turns:
                above = [mine - theirs for mine, theirs in zip(curve, reference, strict=True)]
                differences.plot(tokens, above, **style)
        label = f"word frequency alone: held out {runs[0].unigram_loss:.2f}"
        losses.axhline(runs[0].unigram_loss, color=REFERENCE, linewidth=1.0, linestyle="--", label=label)
        losses.set_ylabel("training loss, smoothed,\nnats per masked token")
        differences.set_ylabel(f"difference to {baseline},\nnats")
        differences.set_xlabel("tokens")
        differences.set_xlim(left=0)
        short_ticks(differences.xaxis)
        losses.legend(frameon=False)


def _final(run: Run, reference: Run) -> dict[str, Any]:
    whole = summary(run.windows)
    last = summary(run.windows[-max(1, len(run.windows) // LAST_SHARE) :])
    pairs = [] if run.system.takes_turns else list(zip(run.windows, reference.windows, strict=True))
    return {
        "system": run.system.name,
        "average_every": run.system.average_every,
        "staleness": run.system.staleness,
        "learning_rate": max(row.learning_rate for row in run.windows),
        "windows": whole.windows,
        "tokens": whole.tokens,
        "training_loss": last.loss,
        "held_out_loss": run.held_out_loss,
        "unigram_loss": run.unigram_loss,
        "held_out_difference": run.held_out_loss - reference.held_out_loss,
        "largest_difference": max((abs(mine.loss - theirs.loss) for mine, theirs in pairs), default=None),
        "largest_weight_difference": run.weight_difference,
        "bytes_per_token": whole.bytes_per_token,
        "bytes_per_token_up": whole.bytes_per_token_up,
        "bytes_per_token_down": whole.bytes_per_token_down,
        "bytes_per_token_averaging": whole.update_bytes_per_token,
        "client_flops_per_token": run.client.flops_per_token if run.client else None,
        "client_peak_memory_mb": run.client.peak_memory_mb if run.client else None,
        "seconds": round(run.seconds, 1),
        "seconds_in_windows": round(whole.seconds, 1),
        "commit": run.commit,
    }


def _find(runs: Sequence[Run], name: str) -> Run:
    return next(run for run in runs if run.system.name == name)


def _client_costs(row: Mapping[str, Any]) -> list[str]:
    if not row.get("client_flops_per_token"):
        return ["", ""]
    return [f"{row['client_flops_per_token'] / 1e6:.2f} M", f"{row['client_peak_memory_mb']} MB"]


def _signed(difference: float) -> str:
    # A difference below the last digit shown has no sign.
    return f"{difference:+.3f}" if abs(difference) >= 0.0005 else "0.000"


def _significant(difference: float) -> str:
    return f"{difference:.1e}" if difference < 0.01 else f"{difference:.2f}"
