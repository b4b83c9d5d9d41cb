"""The rows of `bench kernels` as a table and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedbert_ds.bench.kernels.baselines import BOTH, FORWARD, OURS

Row = Mapping[str, Any]
Group = tuple[str, str, float, int]
"""Kernel, case, dropout, head size (0 where there is none)."""


def table(rows: Sequence[Row]) -> str:
    """Markdown: a line for each case and rival that ran, and below what did not and why."""
    lines = [
        "| kernel | case | by | forward, ms | forward + backward, ms | rate of the last | of peak | ours is faster |",
        "| --- | --- | --- | --: | --: | --: | --: | --: |",
    ]
    for group, members in groups(rows).items():
        kernel, case = title(group)
        for rival, passes in members.items():
            if "milliseconds" in passes[FORWARD]:
                last = _last(passes)
                times = "" if rival == OURS else _times(members[OURS], passes)
                lines.append(
                    f"| {kernel} | {case} | {rival} | {_milliseconds(passes[FORWARD])} | "
                    f"{_milliseconds(passes.get(BOTH))} | {_rate(last)} | {last['share_of_peak']:.0%} | {times} |"
                )
    return "\n".join([*lines, "", *_not_measured(rows)])


def _not_measured(rows: Sequence[Row]) -> list[str]:
    """A line for each reason: who and where."""
    found: dict[str, dict[str, list[str]]] = {}
    for group, members in groups(rows).items():
        for rival, passes in members.items():
            for what, row in passes.items():
                if "reason" in row:
                    cases = found.setdefault(row["reason"], {}).setdefault(rival, [])
                    cases.append(f"{', '.join(title(group))}, {what}")
    return [
        f"Not measured, {reason}: "
        + "; ".join(rival if len(cases) > 2 else f"{rival} ({'; '.join(cases)})" for rival, cases in rivals.items())
        + "."
        for reason, rivals in found.items()
    ]


def groups(rows: Sequence[Row]) -> dict[Group, dict[str, dict[str, Row]]]:
    """{group: {rival: {pass: row}}}, all in the order of the rows."""
    found: dict[Group, dict[str, dict[str, Row]]] = {}
    for row in rows:
        group = (row["kernel"], row["case"], row["dropout"], row.get("head_size", 0))
        found.setdefault(group, {}).setdefault(row["rival"], {})[row["pass"]] = row
    return found


def title(group: Group) -> tuple[str, str]:
    """(kernel, case) for a reader."""
    kernel, case, dropout, head_size = group
    return f"{kernel}, d = {head_size}" if head_size else kernel, f"{case}, dropout {dropout}" if dropout else case


def draw(path: Path, rows: Sequence[Row]) -> None:
    """A panel for each kernel; in it a group of bars for each case, a bar for each rival: its rate."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[str, list[tuple[str, list[Row]]]] = {}
    for group, members in groups(rows).items():
        kernel, case = title(group)
        last = [_last(passes) for passes in members.values() if "milliseconds" in passes[FORWARD]]
        panels.setdefault(kernel, []).append((case, last))
    names = list(dict.fromkeys(row["rival"] for row in rows if "milliseconds" in row))
    colors = {name: _COLORS[number % len(_COLORS)] for number, name in enumerate(names)}
    bars = {kernel: sum(len(members) + 1 for _, members in cases) for kernel, cases in panels.items()}
    figure = Figure(figsize=(9, 1.5 + 0.17 * sum(bars.values()) + 0.7 * len(bars)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    every = figure.subplots(len(panels), 1, squeeze=False, height_ratios=[bars[kernel] + 2 for kernel in panels])
    for axes, (kernel, cases) in zip(every[:, 0], panels.items(), strict=True):
        place, ticks = 0.0, []
        for case, measured in cases:
            ticks.append((place + (len(measured) - 1) / 2, case))
            for row in measured:
                unit, rate = _unit_and_rate(row)
                axes.barh(place, rate, height=0.85, color=colors[row["rival"]])
                axes.set_xlabel(f"{unit}, {row['pass']}", fontsize=8)
                place += 1.0
            place += 1.0
        axes.set_yticks([tick for tick, _ in ticks], [label for _, label in ticks], fontsize=8)
        axes.invert_yaxis()
        axes.set_title(kernel, fontsize=10, loc="left")
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(axis="x", color="#e4e4e4", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    handles = [every[0, 0].barh(0, 0, color=color, label=name) for name, color in colors.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _unit_and_rate(row: Row) -> tuple[str, float]:
    unit = "TFLOP/s" if "TFLOP/s" in row else "GB/s"
    return unit, row[unit]


def _last(passes: Mapping[str, Row]) -> Row:
    """Forward + backward where it was measured, else forward."""
    return [row for row in passes.values() if "milliseconds" in row][-1]


def _milliseconds(row: Row | None) -> str:
    return f"{row['milliseconds']:.3g}" if row is not None and "milliseconds" in row else ""


def _rate(row: Row) -> str:
    unit, rate = _unit_and_rate(row)
    return f"{rate * 1e3:.3g} GFLOP/s" if unit == "TFLOP/s" and rate < 1.0 else f"{rate:.3g} {unit}"


def _times(ours: Mapping[str, Row], theirs: Mapping[str, Row]) -> str:
    """How many times as fast ours is, in the last pass that both have."""
    both = [what for what in theirs if "milliseconds" in theirs[what] and "milliseconds" in ours[what]]
    return f"{theirs[both[-1]]['milliseconds'] / ours[both[-1]]['milliseconds']:.2f}x" if both else ""


_COLORS = (
    "#1f4e8c", "#c9c9c9", "#b5482a", "#c98a1b", "#4c7a34", "#7a4c8c", "#8a8a8a", "#2a9d8f", "#d08fb0", "#5b5b5b",
    "#a8c686", "#6f9bd1",
)  # fmt: skip
