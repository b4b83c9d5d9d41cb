"""Rows of `bench pipeline` as a sentence, a table and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedbert_ds.bench.pipeline.settings import CENTRALIZED, OURS
from fedbert_ds.telemetry.plots import COLORS, REFERENCE, picture
from fedbert_ds.telemetry.tables import markdown

Row = dict[str, Any]


def sentence(row: Row) -> str:
    """A row in one line."""
    bytes_per_token = row["bytes_per_token_up"] + row["bytes_per_token_down"]
    bound = f" (bound {100 * row['utilization_bound']:.1f})" if row["utilization_bound"] else ""
    return (
        f"{_name(row):34} {_link(row):20} {row['tokens_per_second']:9,.0f} tokens/s   body busy "
        f"{100 * row['utilization']:.1f} %{bound}   {bytes_per_token:,.0f} bytes/token"
    )


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown, with ratios to centralized and to each baseline over the same link.

    The mean counts where one of these was measured twice, before and after ours.
    """
    baselines = [name for name in dict.fromkeys(row["system"] for row in rows) if name not in (OURS, CENTRALIZED)]
    centralized, others = _speeds(rows, CENTRALIZED), [_speeds(rows, name) for name in baselines]

    def cells(row: Row) -> list[str]:
        place, is_ours, speed = (row["rtt_ms"], row["mbit"]), row["system"] == OURS, row["tokens_per_second"]
        is_compared = place in centralized and row["system"] != CENTRALIZED
        return [
            _name(row),
            f"(beside {_link(row)})" if row["system"] == CENTRALIZED else _link(row),
            f"{speed:,.0f}",
            f"{100 * speed / centralized[place]:.0f} %" if is_compared else "",
            *(f"{speed / other[place]:.1f}" if place in other and is_ours else "" for other in others),
            f"{100 * row['utilization']:.1f} %",
            f"{100 * row['utilization_bound']:.1f} %" if row["utilization_bound"] and is_ours else "",
            f"{row['bytes_per_token_up']:,.0f}",
            f"{row['bytes_per_token_down']:,.0f}",
            f"{100 * row['dummy_share']:.0f} %",
        ]

    heads = ["system", "link", "tokens/s", "of centralized", *(f"times {name}" for name in baselines)]
    heads += ["body busy", "bound", "bytes/token up", "down", "dummies"]
    return markdown(heads, map(cells, rows), words=2)


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Tokens/s and busy share of every system over round-trip time."""
    lines: dict[str, list[Row]] = {}
    for row in rows:
        if row["system"] != CENTRALIZED:
            lines.setdefault(_name(row), []).append(row)
    with picture(path, 11, 4.2, columns=2) as (_, (speed, busy)):
        for (name, line), color in zip(lines.items(), COLORS, strict=False):
            rtt, style = [row["rtt_ms"] for row in line], {"marker": "o", "color": color, "label": name}
            speed.plot(rtt, [row["tokens_per_second"] for row in line], **style)
            busy.plot(rtt, [100 * row["utilization"] for row in line], **style)
        central = [row["tokens_per_second"] for row in rows if _name(row) == CENTRALIZED]
        if central:
            speed.axhline(statistics.mean(central), color=REFERENCE, linestyle="--", label=CENTRALIZED)
        for axes, label in ((speed, "tokens/s"), (busy, "body busy, %")):
            axes.set_xlabel("round trip, ms")
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0)
        speed.legend(fontsize=8)


def _name(row: Row) -> str:
    return ", ".join(filter(None, [row["system"], row["variant"]]))


def _link(row: Row) -> str:
    return f"{row['rtt_ms']:g} ms" + (f", {row['mbit']:g} Mbit/s" if row["mbit"] else "")


def _speeds(rows: Sequence[Row], system: str) -> dict[tuple[float, float | None], float]:
    """Mean tokens/s of a system, its variants apart, by link."""
    speeds: dict[tuple[float, float | None], list[float]] = {}
    for row in rows:
        if _name(row) == system:
            speeds.setdefault((row["rtt_ms"], row["mbit"]), []).append(row["tokens_per_second"])
    return {link: statistics.mean(measured) for link, measured in speeds.items()}
