"""`sequential` mode in one process: the same halves and body, without server, queue or network."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fedbert_ds.config import RunConfig
from fedbert_ds.data.corpus import read_articles
from fedbert_ds.data.masking import BatchStream, encode
from fedbert_ds.data.tokenizer import load_tokenizer
from fedbert_ds.federation.half_optimizer import HalfOptimizer
from fedbert_ds.model.checkpoint import build_model, save_merged
from fedbert_ds.model.cut import split
from fedbert_ds.model.optimizer import build_optimizer
from fedbert_ds.run_file import parse_config


class OneAfterAnother:
    """Each client in turn trains `average_every` windows with its own optimizer, beginning with the
    weights of the one before.

    Micro-batches are filled, and computed, in the order of the text. Three are in flight, as in the
    run: gradients are summed in the order of the messages, and in no other order are they the same
    to the bit. Dropout must be off.
    """

    def __init__(self, tree: dict[str, Any], data: Mapping[str, str]) -> None:
        self.config: RunConfig = parse_config(tree, "test")
        config = self.config
        self.tokenizer = load_tokenizer(config.tokenizer.path)
        model = build_model(config.model, len(self.tokenizer), self.tokenizer.pad_token_id, config.run.seed).train()
        self.model_config = model.config
        half, self.body = split(model, config.cut)
        self.names = sorted(data)
        self.halves = {name: copy.deepcopy(half).train() for name in self.names}
        for own in self.halves.values():
            own.tie()
        self.optimizers = {
            name: HalfOptimizer(dict(own.named_parameters()), config.optimizer, config.run.windows, clips=True)
            for name, own in self.halves.items()
        }
        self.body_optimizer = build_optimizer(list(self.body.named_parameters()), config.optimizer)
        articles = {name: list(read_articles([data[name]])) for name in self.names}
        sizes = {name: sum(len(article.text) for article in articles[name]) for name in self.names}
        # Each brings its share of all windows to its own.
        total = sum(sizes.values())
        self.shares = {name: config.window.tokens * len(sizes) * size // total for name, size in sizes.items()}
        self.streams = {
            name: BatchStream(
                encode(articles[name], self.tokenizer, config.data.sequence_length), self.tokenizer,
                mask_probability=config.data.mask_probability, whole_word=False, seed=config.run.seed, client=name,
            )
            for name in self.names
        }  # fmt: skip
        self.losses: list[float] = []

    def train(self) -> None:
        """All windows, turn after turn."""
        every = self.config.federation.average_every
        for window in range(self.config.run.windows):
            name = self.names[window // every % len(self.names)]
            self._train_window(name, window)
            if (window + 1) % every == 0:
                trained = dict(self.halves[name].named_parameters())
                for other in self.halves.values():
                    with torch.no_grad():
                        for key, parameter in other.named_parameters():
                            parameter.copy_(trained[key])

    def save(self, folder: Path) -> None:
        """The merged model, as a run leaves it."""
        half = {key: parameter.detach() for key, parameter in self.halves[self.names[0]].named_parameters()}
        body = {key: parameter.detach() for key, parameter in self.body.named_parameters()}
        save_merged(folder, self.model_config, half, body, self.tokenizer)

    def _train_window(self, name: str, window: int) -> None:
        half, batch = self.halves[name], self.streams[name].next_batch(window, self.shares[name])
        total = len(batch.labels)
        micro_batches = self._cut(batch.lengths)
        ends = torch.tensor([0, *batch.lengths]).cumsum(0).tolist()
        flights: list[tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor]] = []
        loss_sum = 0.0

        def forward(first: int, last: int) -> float:
            start, end = ends[first], ends[last]
            mine = (batch.masked_positions >= start) & (batch.masked_positions < end)
            lengths = batch.lengths[first:last]
            activations = half.embed(batch.input_ids[start:end], lengths)
            sent = activations.values.detach().clone().requires_grad_()
            bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            hidden = self.body(sent, batch.masked_positions[mine] - start, bounds, activations.row_index)
            received = hidden.detach().clone()
            loss, gradient = half.head_backward(received, batch.labels[mine], 1.0 / total)
            flights.append((activations, sent, hidden, gradient))
            return loss

        def backward() -> None:
            activations, sent, hidden, gradient = flights.pop(0)
            (hidden * gradient).sum().backward()
            activations.values.backward(sent.grad)

        for first, last in micro_batches:
            if len(flights) == 3:
                backward()
            loss_sum += forward(first, last)
        while flights:
            backward()
        self.losses.append(loss_sum / total)
        self.optimizers[name].step(window)
        for group in self.body_optimizer.param_groups:
            group["lr"] = self.config.optimizer.learning_rate(window, self.config.run.windows)
        self.body_optimizer.step()
        self.body_optimizer.zero_grad()

    def _cut(self, lengths: list[int]) -> list[tuple[int, int]]:
        """Sequences of each micro-batch: the next one that does not fit opens another."""
        cuts, filled = [0], 0
        for number, length in enumerate(lengths):
            if filled + length > self.config.window.tokens_per_micro_batch:
                cuts.append(number)
                filled = 0
            filled += length
        return list(zip(cuts, [*cuts[1:], len(lengths)], strict=True))
