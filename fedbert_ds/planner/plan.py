"""A plan: speed, bottleneck and cost of a federation, beside whole models at the clients."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedbert_ds.config import RunConfig
from fedbert_ds.planner.derive import Machines, Model, derive
from fedbert_ds.planner.scenario import Scenario
from fedbert_ds.planner.simulation import Outcome, simulate
from fedbert_ds.telemetry.plots import COLORS, picture

WINDOWS, SETTLING = 12, 4
LOCAL_STEPS = 512
"""Steps between averages of whole models, as in DiLoCo and its kin (100 to 500)."""
BUSY = 0.9
"""A body busier than this is the bottleneck."""
BUSIEST = 0.6
"""So are links or clients busier than this; they always idle at the ends of windows."""


@dataclass(frozen=True)
class Prediction:
    """Figures of a scenario."""

    gpus: int
    clients: int
    tokens_per_second: float
    busy_share: float
    launching_share: float
    """Of their time, bodies wait for the host to launch what they compute."""
    bytes_per_token: float
    """Both ways, activations and gradients."""
    bytes_per_token_averaging: float
    bottleneck: str
    """body, host, server, network, clients, memory or flush."""
    in_flight: int
    """Micro-batches, at most, in the last window."""
    wanted_in_flight: int
    """What would have hidden the clients' round trips then."""
    affordable_in_flight: int
    """What a GPU's memory holds."""
    bytes_kept_per_token: float
    """Of a GPU's memory, by a micro-batch in flight."""
    dummy_share: float
    days: float
    cost: float
    coordinator_seconds: float
    """CPU seconds of all ranks' queues a window, measured on this machine."""


@dataclass(frozen=True)
class WholeModel:
    """The alternative without a server body: averages of whole models (DiLoCo)."""

    tokens_per_second: float
    bytes_per_token: float
    gigabytes: float
    """A client's weights, gradients and optimizer states, fp32."""


def predict(config: RunConfig, machines: Machines, tokens: float) -> Prediction:
    """Simulate a run file on these machines; days and cost are those of `tokens` tokens."""
    scenario, _ = derive(config, machines)
    return predicted(scenario, simulate(scenario, WINDOWS, SETTLING), tokens, machines.price)


def predicted(scenario: Scenario, outcome: Outcome, tokens: float, price: float) -> Prediction:
    """Figures of a simulated scenario."""
    seconds = tokens / outcome.tokens_per_second
    exchanges = scenario.strategy.exchanges_per_window
    # Participants send updates, and all clients receive them combined.
    copies = scenario.num_participants + len(scenario.clients)
    averaging = copies * scenario.wire.update * exchanges / scenario.tokens_per_window
    return Prediction(
        gpus=scenario.num_ranks,
        clients=len(scenario.clients),
        tokens_per_second=outcome.tokens_per_second,
        busy_share=outcome.busy_share,
        launching_share=outcome.launching_share,
        bytes_per_token=scenario.wire.up + scenario.wire.down,
        bytes_per_token_averaging=averaging,
        bottleneck=bottleneck(outcome),
        in_flight=outcome.windows[-1].in_flight,
        wanted_in_flight=outcome.windows[-1].wanted_in_flight,
        affordable_in_flight=scenario.affordable_in_flight,
        bytes_kept_per_token=scenario.bytes_kept_per_token,
        dummy_share=outcome.dummy_share,
        days=seconds / 86400,
        cost=seconds / 3600 * scenario.num_ranks * price,
        coordinator_seconds=outcome.coordinator_seconds,
    )


def bottleneck(outcome: Outcome) -> str:
    """The bottleneck.

    If nothing is busy: `memory` where it holds fewer micro-batches in flight than round trips need,
    else `flush`: the ends of windows wait for round trips and exchanges.
    """
    if outcome.busy_share >= BUSY:
        return "body"
    if outcome.busy_share + outcome.launching_share >= BUSY:
        return "host"
    busiest = max(
        (outcome.server_busy_share, "server"),
        (outcome.link_busy_share, "network"),
        (outcome.client_busy_share, "clients"),
    )
    if busiest[0] >= BUSIEST:
        return busiest[1]
    last = outcome.windows[-1]
    return "memory" if last.in_flight < last.wanted_in_flight else "flush"


def whole_model(config: RunConfig, machines: Machines, model: Model) -> WholeModel:
    """The same clients without a server body, averaging whole models every LOCAL_STEPS steps."""
    parameters = model.body_parameters + model.half_parameters
    flops = model.body_flops + model.embed_flops + model.head_flops
    tokens_per_step = config.window.tokens / machines.clients
    return WholeModel(
        tokens_per_second=machines.clients * machines.client_flops / flops,
        bytes_per_token=2 * 4 * parameters / (LOCAL_STEPS * tokens_per_step),
        gigabytes=16 * parameters / 1e9,
    )


def sweep(config: RunConfig, machines: Machines, tokens: float, tokens_per_client: int) -> Iterator[Prediction]:
    """Predictions up to 10,000 clients and 64 GPUs, with `tokens_per_client` a window."""
    for gpus in (1, 8, 64):
        for clients in (10, 30, 100, 300, 1000, 3000, 10_000):
            if clients < gpus:
                continue
            window = config.window.model_copy(update={"tokens": clients * tokens_per_client})
            grown = config.model_copy(update={"window": window})
            yield predict(grown, replace(machines, gpus=gpus, clients=clients), tokens)


def report(config: RunConfig, machines: Machines, tokens: float) -> tuple[Prediction, str]:
    """The plan, and the plan in words."""
    scenario, model = derive(config, machines)
    plan = predicted(scenario, simulate(scenario, WINDOWS, SETTLING), tokens, machines.price)
    other = whole_model(config, machines, model)
    advice = {
        "body": "the body is saturated: more GPUs make it faster",
        "host": "the host launches too slowly for the device: larger window.tokens_per_micro_batch",
        "server": "a rank's network, or the threads that compress, hold it back: more cores, cut: rows, or more GPUs",
        "network": "links hold it back: a smaller codec, cut: rows, or more clients",
        "clients": "clients' machines hold it back: more clients, or a smaller share for slow ones",
        "memory": "too few micro-batches are in flight: body.activation_checkpointing: attention, or layers, or more "
        "clients to a micro-batch, which then answer sooner: window.clients_per_micro_batch",
        "flush": "nothing is busy: larger window.tokens, average_every, federation.staleness: 1, or, for slow clients, "
        "more clients at work at a time: window.clients_per_micro_batch",
    }[plan.bottleneck]
    body, half = model.body_parameters / 1e6, model.half_parameters / 1e6
    better = other.tokens_per_second > plan.tokens_per_second
    words = "\n".join(
        [
            f"model    body {body:.1f} M parameters, {model.body_flops / 1e9:.2f} GFLOP a token; "
            f"client half {half:.1f} M",
            f"speed    {plan.tokens_per_second:,.0f} tokens/s, body busy {100 * plan.busy_share:.1f} %, "
            f"waiting for the host {100 * plan.launching_share:.1f} %, "
            f"{plan.in_flight} micro-batches in flight, {100 * plan.dummy_share:.0f} % dummies",
            f"memory   {plan.bytes_kept_per_token / 1e3:,.1f} kB a token in flight: {machines.gpu_memory / 1e9:g} GB "
            f"hold {plan.affordable_in_flight:,} micro-batches, clients' answers need {plan.wanted_in_flight:,}",
            f"limit    {plan.bottleneck}: {advice}",
            f"wire     {plan.bytes_per_token:,.0f} bytes a token both ways, "
            f"{plan.bytes_per_token_averaging:,.0f} more for client updates",
            f"budget   {tokens:,.0f} tokens: {plan.days:.1f} days, {plan.cost:,.0f} at {machines.price:g} a GPU hour",
            f"other    whole models averaged every {LOCAL_STEPS} steps: {other.tokens_per_second:,.0f} tokens/s, "
            f"{other.bytes_per_token:,.0f} bytes a token, {other.gigabytes:.1f} GB on every client"
            + ("; faster here, if clients can hold that" if better else ""),
        ]
    )
    return plan, words


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Curves of a sweep over clients: tokens/s, busy share, cost, coordinator time."""
    what = {
        "tokens_per_second": "tokens/s",
        "busy_share": "body busy",
        "cost": "cost to the budget",
        "coordinator_seconds": "coordinator, CPU s a window",
    }
    with picture(path, 11, 7.5, rows=2, columns=2) as (_, panels):
        for (name, label), axes in zip(what.items(), panels, strict=True):
            for gpus, color in zip(sorted({row["gpus"] for row in rows}), COLORS, strict=False):
                line = [row for row in rows if row["gpus"] == gpus]
                clients, values = [row["clients"] for row in line], [row[name] for row in line]
                axes.plot(clients, values, marker="o", color=color, label=f"{gpus} GPUs")
            axes.set_xscale("log")
            if name != "busy_share":
                axes.set_yscale("log")
            axes.set_xlabel("clients")
            axes.set_ylabel(label)
        panels[0].legend()


def as_row(prediction: Prediction) -> dict[str, Any]:
    """For a record."""
    row: dict[str, Any] = json.loads(json.dumps(asdict(prediction)))
    return row
