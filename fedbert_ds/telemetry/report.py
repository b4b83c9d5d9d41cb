"""A run on one page: a picture of the loss, and figures of progress, body and wire."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, cycle
from pathlib import Path

from fedbert_ds.atomic_write import write_text
from fedbert_ds.telemetry.evaluations import Evaluation, best_of
from fedbert_ds.telemetry.metrics import Summary, WindowMetrics, summary
from fedbert_ds.telemetry.plots import COLORS, picture, short_ticks
from fedbert_ds.telemetry.progress import duration, short_bytes, short_number

Table = Sequence[tuple[str, str]]


def write_report(
    folder: Path,
    config_yaml: str,
    rows: Sequence[WindowMetrics],
    facts: Mapping[str, str],
    baselines: Mapping[str, float] | None = None,
    evaluations: Sequence[Evaluation] = (),
) -> Path:
    """Write loss.png and report.html into `folder`; returns the page's path.

    `facts` become a table (model, machine, held-out loss ...), `baselines` named lines.
    """
    loss = folder / "loss.png"
    draw_loss(loss, rows, baselines or {}, evaluations)
    page = folder / "report.html"
    write_text(page, _page(folder.name, loss.read_bytes(), rows, facts, config_yaml, evaluations))
    return page


def draw_loss(
    path: Path,
    rows: Sequence[WindowMetrics],
    baselines: Mapping[str, float],
    evaluations: Sequence[Evaluation] = (),
) -> None:
    """Training loss against tokens: each window thin, smoothed thick, baselines dashed; held-out
    losses of clients as points.
    """
    tokens = list(accumulate(row.tokens for row in rows))
    with picture(path, 8, 4) as (_, (axes,)):
        if len(rows) > 1:
            axes.plot(tokens, [row.loss for row in rows], color="#9db7d5", linewidth=0.8, label="each window")
        marker = "" if len(rows) > 1 else "o"
        axes.plot(tokens, smoothed(rows), color=COLORS[0], linewidth=1.8, marker=marker, label="smoothed")
        told = [evaluation for evaluation in evaluations if evaluation.worst is not None]
        if told:
            before = {row.window + 1: count for row, count in zip(rows, tokens, strict=True)}
            places = [before.get(evaluation.window, 0) for evaluation in told]
            means = [evaluation.loss for evaluation in told]
            worst = [evaluation.clients[evaluation.worst].loss for evaluation in told if evaluation.worst]
            axes.plot(places, means, "o-", color=COLORS[-1], markersize=3, linewidth=1.0, label="held out, clients")
            axes.plot(places, worst, "^", color=COLORS[-1], markersize=3, label="held out, worst client")
        for (name, value), color in zip(baselines.items(), cycle(COLORS[1:]), strict=False):
            axes.axhline(value, color=color, linewidth=1.2, linestyle="--", label=f"{name} {value:.2f}")
        axes.set_xlabel("tokens")
        axes.set_ylabel("loss, nats per masked token")
        axes.set_xlim(left=0)
        short_ticks(axes.xaxis)
        axes.legend(frameon=False)


def smoothed(rows: Sequence[WindowMetrics]) -> list[float]:
    """Mean loss by masked tokens around each window: a fortieth of the run to either side."""
    reach = len(rows) // 40
    weights = [row.masked_tokens if math.isfinite(row.loss) else 0 for row in rows]
    mass = [0, *accumulate(weights)]
    loss = [0.0, *accumulate(row.loss * weight if weight else 0.0 for row, weight in zip(rows, weights, strict=True))]
    means = []
    for index in range(len(rows)):
        first, last = max(0, index - reach), min(len(rows), index + reach + 1)
        inside = mass[last] - mass[first]
        means.append((loss[last] - loss[first]) / inside if inside else math.nan)
    return means


def _page(
    title: str,
    loss: bytes,
    rows: Sequence[WindowMetrics],
    facts: Mapping[str, str],
    config_yaml: str,
    evaluations: Sequence[Evaluation],
) -> str:
    image = base64.b64encode(loss).decode("ascii")
    whole = summary(rows)
    sections = [
        f'<img alt="Training loss against tokens" src="data:image/png;base64,{image}">',
        _table("The run", [*facts.items()]),
        '<div class="columns">',
        _table("Progress", _progress(rows, whole)),
        _table("The body", _body(whole)),
        _table("The wire, bytes per token", _wire(whole)),
        *([_table("Held-out loss by client, nats per masked token", _held_out(evaluations))] if evaluations else []),
        "</div>",
        f"<details><summary>Configuration</summary><pre>{html.escape(config_yaml)}</pre></details>",
    ]
    return _TEMPLATE.format(title=html.escape(title), style=_STYLE, content="\n".join(sections))


def _progress(rows: Sequence[WindowMetrics], whole: Summary) -> Table:
    last = summary(rows[-max(1, len(rows) // 20) :])
    return [
        ("windows", f"{whole.windows:,}"),
        ("tokens", f"{whole.tokens:,}"),
        ("time in windows", duration(whole.seconds)),
        ("tokens per second", short_number(whole.tokens_per_second)),
        ("loss, last 5 %", "none" if math.isnan(last.loss) else f"{last.loss:.3f}"),
        ("masked tokens left out", _percent(whole.lost_share)),
    ]


def _body(whole: Summary) -> Table:
    return [
        ("busy", _percent(whole.busy_share)),
        ("waiting for clients", _percent(whole.wait_share)),
        ("waiting for other ranks", _percent(whole.rank_wait_share)),
        ("saving", _percent(whole.saving_share)),
        ("evaluating", _percent(whole.evaluation_share)),
        ("host", _percent(whole.host_share)),
        ("fill of micro-batches", _percent(whole.fill)),
        ("dummy micro-batches", _percent(whole.dummy_share)),
    ]


def _held_out(evaluations: Sequence[Evaluation]) -> Table:
    last, best = evaluations[-1], best_of(evaluations)
    rows = [(name, f"{loss.loss:.3f}") for name, loss in last.clients.items()]
    rows += [(name, "did not report") for name in last.missing]
    rows.append((f"all, before window {last.window}", f"{last.loss:.3f}"))
    if best is not None:
        rows.append((f"lowest of all, before window {best.window}", f"{best.loss:.3f}"))
    return rows


def _wire(whole: Summary) -> Table:
    return [
        ("up", short_bytes(whole.bytes_per_token_up)),
        ("down", short_bytes(whole.bytes_per_token_down)),
        ("client updates", short_bytes(whole.update_bytes_per_token)),
        ("all", short_bytes(whole.bytes_per_token)),
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _table(caption: str, entries: Table) -> str:
    lines = [
        f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(value)}</td></tr>' for name, value in entries
    ]
    return "\n".join(["<table>", f"<caption>{html.escape(caption)}</caption>", *lines, "</table>"])


_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2733; background: #fff; max-width: 60rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.4rem; font-weight: 600; }
h1 span { color: #66727f; font-weight: 400; }
img { width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; margin: 1.2rem 0; }
caption { text-align: left; font-weight: 600; padding-bottom: .3rem; }
th, td { padding: .3rem 0; border-top: 1px solid #e2e6ea; vertical-align: top; font-weight: 400; }
th { text-align: left; color: #4a5663; padding-right: 1rem; white-space: nowrap; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 0 2.5rem;
           align-items: start; }
.columns td { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.columns th { white-space: normal; }
summary { cursor: pointer; font-weight: 600; }
pre { background: #f5f7f9; padding: 1rem; overflow-x: auto; font-size: .85rem; line-height: 1.4; }
"""

_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: FedBERT-DS</title>
<style>{style}</style>
</head>
<body>
<h1>{title} <span>FedBERT-DS run report</span></h1>
{content}
</body>
</html>
"""
