"""What `bench pipeline` tells of its rows: a line as each ends, a table beside what it is compared with, a picture."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def sentence(row: dict[str, Any]) -> str:
    """A row in one line."""
    link = f"{row['rtt_ms']:g} ms" + (f", {row['mbit']:g} Mbit/s" if row["mbit"] else "")
    bytes_per_token = row["bytes_per_token_up"] + row["bytes_per_token_down"]
    bound = f" (bound {100 * row['utilization_bound']:.1f})" if row["utilization_bound"] else ""
    name = ", ".join(filter(None, [row["system"], row["variant"]]))
    return (
        f"{name:34} {link:20} {row['tokens_per_second']:9,.0f} tokens/s   body busy "
        f"{100 * row['utilization']:.1f} %{bound}   {bytes_per_token:,.0f} bytes/token"
    )


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown, tokens/s also as a share of centralized and a multiple of naive over the same link.

    Where one of these was measured twice, before and after ours, their mean counts.
    """

    def beside(system: str) -> dict[tuple[float, float | None], float]:
        speeds: dict[tuple[float, float | None], list[float]] = {}
        for row in rows:
            if row["system"] == system and not row["variant"]:
                speeds.setdefault((row["rtt_ms"], row["mbit"]), []).append(row["tokens_per_second"])
        return {link: statistics.mean(measured) for link, measured in speeds.items()}

    centralized, naive = beside("centralized"), beside("naive")
    heads = ["system", "link", "tokens/s", "of centralized", "times naive", "body busy", "bound"]
    heads += ["bytes/token up", "down", "dummies"]
    lines = [f"| {' | '.join(heads)} |", "| --- | --- |" + " --: |" * (len(heads) - 2)]
    for row in rows:
        link = f"{row['rtt_ms']:g} ms" + (f", {row['mbit']:g} Mbit/s" if row["mbit"] else "")
        base, whole = (speeds.get((row["rtt_ms"], row["mbit"])) for speeds in (naive, centralized))
        cells = [
            ", ".join(filter(None, [row["system"], row["variant"]])),
            f"(beside {link})" if row["system"] == "centralized" else link,
            f"{row['tokens_per_second']:,.0f}",
            f"{100 * row['tokens_per_second'] / whole:.0f} %" if whole and row["system"] != "centralized" else "",
            f"{row['tokens_per_second'] / base:.1f}" if base and row["system"] == "ours" else "",
            f"{100 * row['utilization']:.1f} %",
            f"{100 * row['utilization_bound']:.1f} %" if row["utilization_bound"] and row["system"] == "ours" else "",
            f"{row['bytes_per_token_up']:,.0f}",
            f"{row['bytes_per_token_down']:,.0f}",
            f"{100 * row['dummy_share']:.0f} %",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Tokens/s and busy share of every system over round-trip time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (speed, busy) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["system"] != "centralized":
            lines.setdefault(", ".join(filter(None, [row["system"], row["variant"]])), []).append(row)
    for name, line in lines.items():
        rtt = [row["rtt_ms"] for row in line]
        speed.plot(rtt, [row["tokens_per_second"] for row in line], marker="o", label=name)
        busy.plot(rtt, [100 * row["utilization"] for row in line], marker="o", label=name)
    central = [row["tokens_per_second"] for row in rows if row["system"] == "centralized" and not row["variant"]]
    if central:
        speed.axhline(statistics.mean(central), color="black", linestyle="--", label="centralized")
    for axes, label in ((speed, "tokens/s"), (busy, "body busy, %")):
        axes.set_xlabel("round trip, ms")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    speed.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
