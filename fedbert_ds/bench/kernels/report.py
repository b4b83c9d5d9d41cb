"""The rows of `bench kernels` as a table and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from fedbert_ds.bench.kernels.problem import BOTH, FORWARD, OURS
from fedbert_ds.telemetry.plots import COLORS, PALE, picture
from fedbert_ds.telemetry.tables import markdown

Row = Mapping[str, Any]
Group = tuple[str, str, float, int]
"""Kernel, case, dropout, head size (0 where there is none)."""


def table(rows: Sequence[Row]) -> str:
    """Markdown: a line for each case and way that ran, and below what did not and why."""
    heads = ["kernel", "case", "by", "forward, ms", "forward + backward, ms", "rate of the last", "of peak"]
    cells = []
    for group, members in groups(rows).items():
        kernel, case = title(group)
        for way, passes in members.items():
            if "milliseconds" in passes[FORWARD]:
                last = _last(passes)
                times = "" if way == OURS else _times(members[OURS], passes)
                figures = [_milliseconds(passes[FORWARD]), _milliseconds(passes.get(BOTH)), _rate(last)]
                cells.append([kernel, case, way, *figures, f"{last['share_of_peak']:.0%}", times])
    return "\n".join([markdown([*heads, "ours is faster"], cells, words=3), "", *_not_measured(rows)])


def _not_measured(rows: Sequence[Row]) -> list[str]:
    """A line for each reason: who and where."""
    found: dict[str, dict[str, list[str]]] = {}
    for group, members in groups(rows).items():
        for way, passes in members.items():
            for what, row in passes.items():
                if "reason" in row:
                    cases = found.setdefault(row["reason"], {}).setdefault(way, [])
                    cases.append(f"{', '.join(title(group))}, {what}")
    return [
        f"Not measured, {reason}: "
        + "; ".join(way if len(cases) > 2 else f"{way} ({'; '.join(cases)})" for way, cases in ways.items())
        + "."
        for reason, ways in found.items()
    ]


def groups(rows: Sequence[Row]) -> dict[Group, dict[str, dict[str, Row]]]:
    """{group: {way: {pass: row}}}, all in the order of the rows."""
    found: dict[Group, dict[str, dict[str, Row]]] = {}
    for row in rows:
        group = (row["kernel"], row["case"], row["dropout"], row.get("head_size", 0))
        found.setdefault(group, {}).setdefault(way_of(row), {})[row["pass"]] = row
    return found


def title(group: Group) -> tuple[str, str]:
    """(kernel, case) for a reader."""
    kernel, case, dropout, head_size = group
    return f"{kernel}, d = {head_size}" if head_size else kernel, f"{case}, dropout {dropout}" if dropout else case


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Rates: a panel a kernel, a group of bars a case, a bar a way."""
    cases: dict[str, list[tuple[str, list[Row]]]] = {}
    for group, members in groups(rows).items():
        kernel, case = title(group)
        last = [_last(passes) for passes in members.values() if "milliseconds" in passes[FORWARD]]
        cases.setdefault(kernel, []).append((case, last))
    names = list(dict.fromkeys(way_of(row) for row in rows if "milliseconds" in row))
    colors = dict(zip(names, cycle((COLORS[0], PALE, *COLORS[1:])), strict=False))
    bars = {kernel: sum(len(members) + 1 for _, members in groups) for kernel, groups in cases.items()}
    height, ratios = 1.5 + 0.17 * sum(bars.values()) + 0.7 * len(bars), [count + 2 for count in bars.values()]
    with picture(path, 9, height, rows=len(cases), grid="x", height_ratios=ratios) as (figure, panels):
        for axes, (kernel, measured) in zip(panels, cases.items(), strict=True):
            _draw_kernel(axes, measured, colors)
            axes.set_title(kernel, fontsize=10, loc="left")
            axes.tick_params(axis="x", labelsize=8)
        handles = [panels[0].barh(0, 0, color=color, label=name) for name, color in colors.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)


def _draw_kernel(axes: Any, cases: Sequence[tuple[str, Sequence[Row]]], colors: Mapping[str, str]) -> None:
    place, ticks = 0.0, []
    for case, measured in cases:
        ticks.append((place + (len(measured) - 1) / 2, case))
        for row in measured:
            unit, rate = _unit_and_rate(row)
            axes.barh(place, rate, height=0.85, color=colors[way_of(row)])
            axes.set_xlabel(f"{unit}, {row['pass']}", fontsize=8)
            place += 1.0
        place += 1.0
    axes.set_yticks([tick for tick, _ in ticks], [label for _, label in ticks], fontsize=8)
    axes.invert_yaxis()


def way_of(row: Row) -> str:
    """Who computed it; older records call it `rival`."""
    way: str = row["way"] if "way" in row else row["rival"]
    return way


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
