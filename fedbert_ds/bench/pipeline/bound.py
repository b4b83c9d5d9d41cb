"""The body's least idle time in a window: two round trips, and an exchange if one is waited for."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fedbert_ds.bench.pipeline.settings import Link
from fedbert_ds.config import RunConfig
from fedbert_ds.federation.client_update import UpdateAssembler, update_chunks
from fedbert_ds.federation.strategy import strategy_of_run
from fedbert_ds.model.checkpoint import build_model
from fedbert_ds.model.cut import split
from fedbert_ds.model.optimizer import build_optimizer
from fedbert_ds.telemetry.timeline import Shares

REPEATS = 5


@dataclass(frozen=True)
class ExchangeWork:
    """Seconds of one client's processor for one exchange of client updates."""

    send: float
    """To code its gradients."""
    take: float
    """To decode their sum, and to step."""


def window_end_seconds(
    spent: Shares, config: RunConfig, link: Link, update_bytes: float, measure_work: Callable[[], ExchangeWork]
) -> float:
    """Least time of a window's end: two round trips, a client's work, an exchange if waited for.

    `update_bytes` cross a client's link for one exchange, both ways counted. `measure_work` takes
    seconds, so it is called only where the exchange is waited for.
    """
    # One round trip is in each of the two answers.
    seconds = spent.activations + spent.gradient
    if strategy_of_run(config).exchanges_per_window == 1.0 and not config.federation.staleness:
        work = measure_work()
        # Nothing of the next window can be computed before updates have crossed the link both ways.
        # Clients share a processor here: all of them have sent before there is a sum, and one has
        # taken it before there is a forward.
        seconds += link.seconds(update_bytes) + config.clients.expected * work.send + work.take
    return seconds


def exchange_work(config: RunConfig, tokenizer: Any) -> ExchangeWork:
    """Least cost: the quickest of several tries each, on one thread, with random gradients."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        half, _ = split(build_model(config.model, len(tokenizer), tokenizer.pad_token_id, config.run.seed), config.cut)
        optimizer = build_optimizer(list(half.named_parameters()), config.optimizer)
        strategy = strategy_of_run(config)
        gradients = {}
        for name, parameter in half.named_parameters():
            parameter.grad = 1e-3 * torch.randn_like(parameter)
            if strategy.takes_part(half.parameter_scope(name)):
                gradients[name] = parameter.grad
        shapes = {name: tuple(gradient.shape) for name, gradient in gradients.items()}
        codec, compressed = strategy.update_codec, config.wire.is_compressed

        def send() -> list[Any]:
            return list(update_chunks(0, gradients.items(), codec, compressed=compressed))

        chunks = send()

        def take() -> None:
            assembler = UpdateAssembler(shapes, "the sum", codec)
            for chunk in chunks:
                assembler.add(chunk)
            optimizer.step()

        return ExchangeWork(quickest(send), quickest(take))
    finally:
        torch.set_num_threads(threads)


def quickest(work: Callable[[], object]) -> float:
    """Seconds of the quickest of several tries."""
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
