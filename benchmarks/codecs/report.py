"""Runs and counted bytes as rows, summary, tables and a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.codecs.counted import Sizes
from benchmarks.codecs.settings import BASELINE, Setting, key_of
from fedbert_ds.telemetry.plots import COLORS, REFERENCE, picture
from fedbert_ds.telemetry.tables import markdown

Row = Mapping[str, Any]
WHAT = ("model", "cut", "activations", "hidden", "gradients")
HEADS = ("model", "cut", "activations", "hidden states", "gradients")


def rows_of(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per run; `cost` is its held-out loss over fp32's, same model and seed, less 1."""
    losses = {(run["setting"], run["seed"]): run["held_out_loss"] for run in runs}
    rows = []
    for run in runs:
        setting = Setting(**json.loads(run["setting"]))
        # A factorized model in fp32 is held against the full one.
        plain = setting.codecs == ("fp32",)
        baseline = BASELINE if plain else Setting(model=setting.model)
        loss = losses.get((key_of(baseline), run["seed"]))
        rows.append(
            {
                **asdict(setting),
                "seed": run["seed"],
                "tokens": run["tokens"],
                "held_out_loss": run["held_out_loss"],
                "training_loss": run["training_loss"],
                "cost": None if loss is None else run["held_out_loss"] / loss - 1.0,
                "bytes_per_token_up": run["bytes_up"] / run["tokens"],
                "bytes_per_token_down": run["bytes_down"] / run["tokens"],
                "seconds": round(run["seconds"], 1),
            }
        )
    return rows


def summarize(rows: Sequence[Mapping[str, Any]], sizes: Mapping[Setting, Sizes]) -> list[dict[str, Any]]:
    """One row per setting that has a run: bytes as counted at width 768, cost in the mean and its
    range over seeds."""
    summary = []
    for setting, size in sizes.items():
        mine = [row for row in rows if all(row[name] == value for name, value in asdict(setting).items())]
        costs = [row["cost"] for row in mine if row["cost"] is not None]
        if not costs:
            continue
        summary.append(
            {
                **asdict(setting),
                "seeds": len(costs),
                "held_out_loss": statistics.mean(row["held_out_loss"] for row in mine),
                "cost": statistics.mean(costs),
                "cost_lowest": min(costs),
                "cost_highest": max(costs),
                "bytes_per_token_up": size.up,
                "bytes_per_token_down": size.down,
                "bytes_per_token": size.up + size.down,
                "bytes_per_token_not_compressed": size.not_compressed,
            }
        )
    return summary


def table(summary: Sequence[Row]) -> str:
    """The summary as a Markdown table."""
    heads = [*HEADS, "", "bytes per token up", "down", "both", "not compressed"]
    heads += ["loss cost", "range over seeds", "seeds"]
    cells = [
        [
            *(row[name] for name in (*WHAT, "extra")),
            f"{row['bytes_per_token_up']:,.0f}",
            f"{row['bytes_per_token_down']:,.0f}",
            f"{row['bytes_per_token']:,.0f}",
            f"{row['bytes_per_token_not_compressed']:,.0f}",
            f"{100 * row['cost']:+.2f} %",
            f"{100 * row['cost_lowest']:+.2f} to {100 * row['cost_highest']:+.2f}",
            f"{row['seeds']}",
        ]
        for row in summary
    ]
    return markdown(heads, cells, words=len(WHAT) + 1)


def counted_table(counted: Sequence[Row]) -> str:
    """Bytes per token both ways of every setting and text, as a Markdown table."""
    heads = [*HEADS, *(head for text in counted for head in (text["source"], "not compressed"))]
    cells = []
    for sizes in zip(*(text["sizes"] for text in counted), strict=True):
        figures = [(size["up"] + size["down"], size["not_compressed"]) for size in sizes]
        numbers = [f"{number:,.0f}" for pair in figures for number in pair]
        cells.append([*(sizes[0][name] for name in WHAT), *numbers])
    return markdown(heads, cells, words=len(WHAT))


def draw(path: Path, summary: Sequence[Row]) -> None:
    """Loss cost against bytes per token, a point per setting with its range over seeds."""
    kinds = list(dict.fromkeys((row["model"], row["cut"]) for row in summary))
    colors = dict(zip(kinds, COLORS, strict=False))
    with picture(path, 9, 6) as (_, (axes,)):
        for row in summary:
            cost, low, high = (100 * row[name] for name in ("cost", "cost_lowest", "cost_highest"))
            style = {"fmt": "o", "color": colors[row["model"], row["cut"]], "capsize": 2, "linewidth": 1.0}
            axes.errorbar([row["bytes_per_token"]], [cost], [[cost - low], [high - cost]], **style)
            setting = Setting(**{name: row[name] for name in asdict(BASELINE)})
            label = " / ".join(setting.codecs).replace("_hadamard", "")
            label += f"\n{setting.extra}" if setting.extra else ""
            axes.annotate(label, (row["bytes_per_token"], cost), (5, 4), textcoords="offset points", fontsize=7)
        for (model, cut), color in colors.items():
            axes.plot([], [], "o", color=color, label=f"{model} model, cut: {cut}")
        axes.axhline(0.0, color=REFERENCE, linewidth=1.0, linestyle="--")
        axes.set_xscale("log")
        axes.set_xlabel("bytes per token, both ways, at width 768 and 16k tokens a message")
        axes.set_ylabel("held-out loss above fp32, %")
        axes.legend(frameon=False)
