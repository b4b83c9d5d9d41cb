"""The table of all results: mean and spread over seeds, as Markdown and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from fedbert_ds.tasks.glue_tasks import FROM_MNLI, GLUE
from fedbert_ds.telemetry.plots import COLORS, picture
from fedbert_ds.telemetry.tables import markdown

SPLIT_NAMES = {"dev": "", "dev_matched": " m", "dev_mismatched": " mm"}
METRIC_NAMES = {"f1": "F1", "matthews": "Matthews", "pearson": "Pearson", "spearman": "Spearman"}
ROWS = [*GLUE, *(f"{name}-from-MNLI" for name in FROM_MNLI)]
"""In the table's order."""


@dataclass(frozen=True)
class Measure:
    """One metric of a row of the table, over its seeds."""

    row: str
    metric: str
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    """One a seed, from -1 or 0 to 1."""

    @property
    def mean(self) -> float:
        """Over seeds."""
        return mean(self.values)

    @property
    def spread(self) -> float | None:
        """Sample standard deviation over seeds; None for one seed."""
        return stdev(self.values) if len(self.values) > 1 else None


def measures(results: Sequence[Mapping[str, Any]]) -> list[Measure]:
    """Every metric of every row, in the table's order; seeds ascend."""
    found = []
    for row in ROWS:
        runs = sorted((one for one in results if one["row"] == row), key=lambda one: one["seed"])
        if not runs:
            continue
        for split, metrics in runs[0]["dev"].items():
            for metric in metrics:
                found.append(
                    Measure(
                        row + SPLIT_NAMES[split],
                        METRIC_NAMES.get(metric, metric),
                        tuple(one["seed"] for one in runs),
                        tuple(one["dev"][split][metric] for one in runs),
                    )
                )
    return found


def average(results: Sequence[Mapping[str, Any]]) -> float:
    """Mean over tasks of the mean score over seeds; runs from MNLI do not count."""
    scores = [[one["score"] for one in results if one["row"] == name] for name in GLUE]
    return mean(mean(values) for values in scores if values)


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: points of 100 on dev sets, mean and spread over seeds, and each seed's."""
    rows = [
        (
            measure.row,
            measure.metric,
            f"{100 * measure.mean:.1f}",
            "" if measure.spread is None else f"{100 * measure.spread:.1f}",
            ", ".join(f"{100 * value:.1f}" for value in measure.values),
        )
        for measure in measures(results)
    ]
    tasks = [name for name in GLUE if any(one["row"] == name for one in results)]
    if tasks:
        rows.append((f"average of {len(tasks)} tasks", "", f"{100 * average(results):.1f}", "", ""))
    return markdown(("task", "metric", "mean", "±", "seeds"), rows, words=2)


def draw(path: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """A bar for the mean of each measure, a whisker for its spread, a dot for each seed."""
    found = measures(results)
    labels = [f"{measure.row}, {measure.metric}" for measure in found]
    with picture(path, 7.0, 1.0 + 0.32 * len(found), grid="x") as (_, (axes,)):
        for place, measure in enumerate(found):
            axes.barh(
                place, 100 * measure.mean, height=0.6, color=COLORS[0], alpha=0.35,
                xerr=None if measure.spread is None else 100 * measure.spread,
            )  # fmt: skip
            axes.scatter([100 * value for value in measure.values], [place] * len(measure.values), s=9, color=COLORS[1])
        axes.set_yticks(range(len(found)), labels)
        axes.invert_yaxis()
        axes.set_xlabel("points on the dev set: mean, standard deviation and every seed")
