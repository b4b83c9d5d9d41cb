"""Predictions held against a record of `fedbert-ds bench pipeline`.

Costs come from the record:

    the body's speed          the run itself: a machine's speed varies from run to run
    messages and exchanges    the same run without a link
    embeddings and head       the quickest answer of the runs without a link and the same codecs:
                              slower answers waited behind clients on the same processor

The prediction is what the queue hides, over a link, of round trips, rates and exchanges.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedbert_ds.config import FederationSection, WireSection
from fedbert_ds.errors import RunError
from fedbert_ds.federation.strategy import strategy_of
from fedbert_ds.planner.scenario import BodyCosts, ClientCosts, Scenario, Wire
from fedbert_ds.planner.simulation import simulate
from fedbert_ds.telemetry.tables import markdown

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Check:
    """One run, measured and predicted."""

    row: Row
    tokens_per_second: float
    utilization: float

    @property
    def error(self) -> float:
        """Relative error of the predicted tokens/s."""
        return self.tokens_per_second / self.row["tokens_per_second"] - 1.0


def validate(record: Mapping[str, Any]) -> Iterator[Check]:
    """Predict every run of ours over a link; RunError if the record has no run without a link."""
    ours = [row for row in record["rows"] if row["system"] == "ours"]
    bases = {row["variant"]: row for row in ours if row["rtt_ms"] == 0}
    if not bases:
        raise RunError("the record has no run without a link; make it with --rtt 0 and others")
    for row in ours:
        if row["rtt_ms"] == 0 or row["variant"] not in bases:
            continue
        base = bases[row["variant"]]
        alike = [other["seconds"] for other in bases.values() if _coding(other) == _coding(row)]
        work = {answer: min(seconds[answer] for seconds in alike) for answer in ("activations", "gradient")}
        base = {**base, "seconds": {**base["seconds"], **work}}
        outcome = simulate(scenario_of(row, base, record["settings"]))
        yield Check(row, outcome.tokens_per_second, outcome.busy_share)


def _coding(row: Row) -> tuple[Any, Any]:
    return row["cut"], row["codec"]


def scenario_of(row: Row, base: Row, settings: Mapping[str, Any]) -> Scenario:
    """The scenario of `row`, with the costs of `base`, the same run without a link."""
    seconds, tokens, own = base["seconds"], base["window_tokens"], row["seconds"]
    per_piece = tokens / base["micro_batches"]
    federation = FederationSection(mode=row["mode"], average_every=settings["federation"]["average_every"])
    strategy = strategy_of(federation, WireSection())
    is_every_window = strategy.exchanges_per_window == 1.0
    update = row["bytes_per_token_averaging"] * tokens / 2 / row["clients"] if is_every_window else 0.0
    # Without a link, a window with an exchange waits for nothing else: summing, framing, stepping.
    exchange = max(0.0, seconds["wait"]) if is_every_window and not row["staleness"] else 0.0
    rate = row["mbit"] * 1e6 / 8 if row["mbit"] else float("inf")
    # Activations and gradients share the link, so halving what went up matters little.
    up, down = row["bytes_per_token_up"], row["bytes_per_token_down"]
    return Scenario(
        body=BodyCosts(
            forward_per_token=own["forward"],
            backward_per_token=own["backward"],
            per_micro_batch=seconds["messages"],
            step=own["step"],
            gather=seconds["gather"],
        ),
        clients=(
            ClientCosts(
                embed_per_token=seconds["activations"] / per_piece,
                head_per_token=seconds["gradient"] / per_piece,
                rtt=row["rtt_ms"] / 1e3,
                up=rate,
                down=rate,
            ),
        )
        * row["clients"],
        wire=Wire(up / 2, down / 2, up / 2, down / 2, update),
        strategy=strategy,
        tokens_per_window=round(tokens),
        tokens_per_micro_batch=settings["window"]["tokens_per_micro_batch"],
        sequence_tokens=settings["data"]["sequence_length"],
        staleness=row["staleness"],
        client_cores=1,
        combine_per_byte=exchange / (update * row["clients"]) if update else 0.0,
    )


def table(checks: Sequence[Check]) -> str:
    """Measured and predicted, as Markdown."""
    heads = ["run", "link", "tokens/s measured", "predicted", "error", "busy measured", "predicted"]
    cells = [
        [
            check.row["variant"] or "weights averaged rarely, rows at int8",
            f"{check.row['rtt_ms']:g} ms, {check.row['mbit']:g} Mbit/s",
            f"{check.row['tokens_per_second']:,.0f}",
            f"{check.tokens_per_second:,.0f}",
            f"{100 * check.error:+.1f} %",
            f"{100 * check.row['utilization']:.1f} %",
            f"{100 * check.utilization:.1f} %",
        ]
        for check in checks
    ]
    return markdown(heads, cells, words=2)
