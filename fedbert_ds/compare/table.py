"""The rows of a comparison as a table, a verdict and a picture; reads the record alone."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from fedbert_ds.compare.baselines import NOT_PRETRAINED, WORD_FREQUENCY
from fedbert_ds.compare.systems import EACH_ALONE, System
from fedbert_ds.telemetry.plots import COLORS, REFERENCE, picture
from fedbert_ds.telemetry.progress import duration
from fedbert_ds.telemetry.tables import markdown

MARKERS = "osD^vP<>X*"
"""One a system, in the order of colors."""
Column = tuple[str, str, Callable[[float], str]]
"""Key, head, how a value is told."""
FIGURES: tuple[Column, ...] = (
    ("word_cosine", "cosine of words", lambda value: f"{value:.2f}"),
    ("bytes_per_token", "bytes per token", lambda value: f"{value:,.0f}"),
    ("client_flops_per_token", "client FLOP per token", lambda value: f"{value / 1e6:.2f} M"),
    ("client_peak_memory_mb", "client peak memory", lambda value: f"{value:.0f} MB"),
    ("seconds", "wall time", duration),
    ("seconds_in_windows", "in windows", duration),
)
"""Means over seeds; a column that no row has is left out."""

Row = Mapping[str, Any]


def table(rows: Sequence[Row]) -> str:
    """Markdown: a line a system, means over seeds with the sample standard deviation.

    Of several tasks the mean is a column, too, as GLUE's own score is.
    """
    owners = list(rows[0]["held_out"])
    tasks = _tasks(rows)
    scores = [*tasks, *(["mean of tasks"] if len(tasks) > 1 else [])]
    columns = [column for column in FIGURES if any(column[0] in row for row in rows)]
    heads = ["system", "held-out loss", "worst client", *owners, *scores, *(head for _, head, _ in columns)]
    return markdown(heads, [_cells(label, group, owners, tasks, columns) for label, group in grouped(rows).items()])


def verdict(rows: Sequence[Row]) -> list[str]:
    """Sentences: which systems are better than alone for every owner, which for whom not; and than
    no pre-training on every task, on which not.

    By means over seeds. None without a row of clients alone, or of a model not pre-trained.
    """
    groups = grouped(rows)
    trained = {label: group for label, group in groups.items() if _is_trained_together(label, group)}
    losses = {label: owner_means(group) for label, group in trained.items()}
    scores = {label: task_means(group) for label, group in trained.items()}
    lines: list[str] = []
    for system in EACH_ALONE:
        if system.label in groups:
            alone = owner_means(groups[system.label])
            behind = _behind(losses, alone, system.label, operator.lt, 3)
            lines += _verdict(behind, system.label, "for", "owner")
    if NOT_PRETRAINED in groups:
        untrained = task_means(groups[NOT_PRETRAINED])
        complete = {label: points for label, points in scores.items() if points.keys() == untrained.keys()}
        behind = _behind(complete, untrained, NOT_PRETRAINED, operator.gt, 1)
        lines += _verdict(behind, "no pre-training", "on", "task")
    return lines


def _behind(
    values: Mapping[str, Mapping[str, float]],
    reference: Mapping[str, float],
    name: str,
    is_better: Callable[[float, float], bool],
    digits: int,
) -> dict[str, list[str]]:
    """Of each system, the owners or tasks where it is not better than the reference of this name,
    with both values.
    """
    return {
        label: [
            f"{place} ({value:.{digits}f}, {name} {reference[place]:.{digits}f})"
            for place, value in theirs.items()
            if not is_better(value, reference[place])
        ]
        for label, theirs in values.items()
    }


def _is_trained_together(label: str, group: Sequence[Row]) -> bool:
    """False for clients alone, and for what no system trained."""
    return label not in [system.label for system in EACH_ALONE] and "bytes_per_token" in group[0]


def _verdict(behind: Mapping[str, Sequence[str]], against: str, of: str, each: str) -> list[str]:
    """`behind` has, of each system, where it is not better."""
    better = [label for label, places in behind.items() if not places]
    return [
        f"Better than {against} {of} every {each}: {'; '.join(better) or 'none'}.",
        *(
            f"Not better than {against}: {label} {of} {', '.join(places)}."
            for label, places in behind.items()
            if places
        ),
    ]


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Held-out loss: a line an owner and one for all, a mark a system, a dot a seed."""
    groups = grouped(rows)
    owners = list(rows[0]["held_out"])
    with picture(path, 8.0, 1.6 + 0.45 * (len(owners) + 1), grid="x") as (_, (axes,)):
        for (label, group), color, marker in zip(groups.items(), cycle((REFERENCE, *COLORS)), cycle("|" + MARKERS)):
            values = [[row["held_out_loss"] for row in group]]
            values += [[row["held_out"][owner] for row in group] for owner in owners]
            big = 90 if label == WORD_FREQUENCY else 34
            places = range(len(values))
            axes.scatter(list(map(mean, values)), places, s=big, color=color, marker=marker, label=label, alpha=0.85)
            if len(group) > 1:
                each = [(value, place) for place, ones in zip(places, values, strict=True) for value in ones]
                axes.scatter(*zip(*each, strict=True), s=5, color=color)
        axes.set_yticks(range(len(owners) + 1), ["all clients", *owners])
        axes.invert_yaxis()
        axes.set_xlabel("held-out loss, nats per masked token")
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def grouped(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each system, one a seed, by its label; in order."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        system = System(row["system"], row["average_every"], server_lr=row.get("server_lr"))
        found.setdefault(system.label, []).append(row)
    return found


def owner_means(group: Sequence[Row]) -> dict[str, float]:
    """Each owner's mean loss over the seeds of a system."""
    return {owner: mean(row["held_out"][owner] for row in group) for owner in group[0]["held_out"]}


def task_means(group: Sequence[Row]) -> dict[str, float]:
    """Each task's mean over all seeds of a system, in points of 100."""
    return {task: mean(points) for task, points in _points(group, _tasks(group)).items()}


def with_spread(values: Sequence[float], digits: int) -> str:
    """The mean, and where there are several the sample standard deviation."""
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def _tasks(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(task for row in rows for task in row.get("glue", {})))


def _points(group: Sequence[Row], tasks: Sequence[str]) -> dict[str, list[float]]:
    """Of every seed of the model and of its fine-tuning; tasks without any are left out."""
    points = {task: [100 * score for row in group for score in row.get("glue", {}).get(task, [])] for task in tasks}
    return {task: values for task, values in points.items() if values}


def _cells(
    label: str, group: Sequence[Row], owners: Sequence[str], tasks: Sequence[str], columns: Sequence[Column]
) -> list[str]:
    losses = [[row["held_out_loss"] for row in group], [row["held_out"][row["worst_client"]] for row in group]]
    losses += [[row["held_out"][owner] for row in group] for owner in owners]
    points = _points(group, tasks)
    scores = [with_spread(points[task], 1) if task in points else "" for task in tasks]
    if len(tasks) > 1:
        # Where a task is missing the mean of the others would be beside means of all.
        scores.append(f"{mean(map(mean, points.values())):.1f}" if len(points) == len(tasks) else "")
    return [
        label,
        *(with_spread(values, 3) for values in losses),
        *scores,
        *(told(mean(row[key] for row in group)) if key in group[0] else "" for key, _, told in columns),
    ]
