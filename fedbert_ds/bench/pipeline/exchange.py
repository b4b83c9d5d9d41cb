"""What one exchange of client halves costs a client's processor, measured alone on one thread."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fedbert_ds.config import RunConfig
from fedbert_ds.federation.client_update import UpdateAssembler, update_chunks
from fedbert_ds.federation.strategy import exchange_codec, is_exchanged
from fedbert_ds.model.checkpoint import build_model
from fedbert_ds.model.cut import split
from fedbert_ds.model.optimizer import build_optimizer

REPEATS = 5


@dataclass(frozen=True)
class ExchangeWork:
    """Seconds of one client."""

    send: float
    """To code its gradients."""
    take: float
    """To decode their sum, and to step."""


def exchange_work(config: RunConfig, tokenizer: Any) -> ExchangeWork:
    """The quickest of several tries each, so that it is a least cost; gradients are random numbers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        half, _ = split(build_model(config.model, len(tokenizer), tokenizer.pad_token_id, config.run.seed), config.cut)
        optimizer = build_optimizer(list(half.named_parameters()), config.optimizer)
        for parameter in half.parameters():
            parameter.grad = 1e-3 * torch.randn_like(parameter)
        gradients = {
            name: parameter.grad
            for name, parameter in half.named_parameters()
            if parameter.grad is not None and is_exchanged(config.federation, half.parameter_scope(name))
        }
        shapes = {name: tuple(gradient.shape) for name, gradient in gradients.items()}
        codec, compressed = exchange_codec(config.federation, config.wire), config.wire.is_compressed
        chunks = list(update_chunks(0, gradients.items(), 1.0, codec, compressed=compressed))

        def take() -> None:
            assembler = UpdateAssembler(shapes, "the sum", codec)
            for chunk in chunks:
                assembler.add(chunk)
            optimizer.step()

        return ExchangeWork(
            send=_quickest(lambda: list(update_chunks(0, gradients.items(), 1.0, codec, compressed=compressed))),
            take=_quickest(take),
        )
    finally:
        torch.set_num_threads(threads)


def _quickest(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
