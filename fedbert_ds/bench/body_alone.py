"""Centralized training for `bench pipeline`: the same body under the same DeepSpeed engine, with nothing to wait for.

    python -m fedbert_ds.bench.body_alone --config FILE --shards FOLDER --tokenizer FOLDER [--whole] [key=value ...]

Trains on the windows that clients with these shards would bring, packed as the server packs them. With --whole the
embeddings and the head are trained too, in this process: what DeepSpeed alone would do with the pooled text. Without it
activations and gradients are made up beforehand: a ceiling. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fedbert_ds.config import RunConfig
    from fedbert_ds.data.masking import Batch
    from fedbert_ds.model.client_half import ClientHalf
    from fedbert_ds.server.body.engine import BodyInput


def main() -> None:
    """Warm up, then time the windows of the run file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args()
    from fedbert_ds.config import load_config
    from fedbert_ds.server.body.distributed import initialize, shut_down

    config = load_config(options.config, options.overrides)
    initialize()
    from fedbert_ds.bench.text import first_batches
    from fedbert_ds.data.tokenizer import load_tokenizer
    from fedbert_ds.model.checkpoint import build_model
    from fedbert_ds.model.cut import split
    from fedbert_ds.model.optimizer import build_optimizer
    from fedbert_ds.server.body.engine import BodyEngine

    tokenizer = load_tokenizer(options.tokenizer)
    model = build_model(config.model, len(tokenizer), tokenizer.pad_token_id, config.run.seed)
    half, body = split(model, config.cut)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    engine = BodyEngine.build(body.to(device), config, device)
    windows = [_window(config, half, batches) for batches in first_batches(config, options.shards, tokenizer, 3)]
    optimizer = build_optimizer(list(half.named_parameters()), config.optimizer)
    tokens, started = 0, 0.0
    for number in range(config.run.windows):
        # The first window pays for what happens once.
        if number == 1:
            tokens, started = 0, time.monotonic()
        window = windows[number % len(windows)]
        for index, piece in enumerate(window):
            is_last = index + 1 == len(window)
            if options.whole:
                activations = half.embed(piece.input_ids, piece.lengths)
                body_input = replace(piece.body_input, activations=activations.values.detach())
                hidden, _ = engine.forward(index, body_input).result()
                _, gradient = half.head_backward(hidden, piece.labels, 1.0 / sum(len(p.labels) for p in window))
                input_gradient, _ = engine.backward(index, gradient, is_last).result()
                activations.values.backward(input_gradient)
            else:
                engine.forward(index, piece.body_input)
                engine.backward(index, piece.gradient, is_last).result()
            tokens += sum(piece.lengths)
        engine.step(config.optimizer.lr * 1e-3)
        if options.whole:
            optimizer.step()
            optimizer.zero_grad()
    seconds = time.monotonic() - started
    print(json.dumps({"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}))
    shut_down()


@dataclass(frozen=True)
class _MicroBatch:
    """What one micro-batch takes: of the whole model, and of the body alone."""

    input_ids: Tensor
    lengths: list[int]
    labels: Tensor
    body_input: BodyInput
    gradient: Tensor
    """Of the hidden states, made up."""


def _window(config: RunConfig, half: ClientHalf, batches: Mapping[str, Batch]) -> list[_MicroBatch]:
    """One window, packed as the server packs it."""
    from fedbert_ds.server.body.engine import BodyInput
    from fedbert_ds.server.queue.packing import pack
    from fedbert_ds.wire.messages import Manifest

    manifests = []
    for name, batch in batches.items():
        ends = torch.tensor([0, *batch.lengths]).cumsum(0)
        masked = torch.searchsorted(batch.masked_positions, ends).diff().tolist()
        manifests.append(Manifest(name, 0, tuple(batch.lengths), tuple(masked)))
    random = torch.Generator().manual_seed(1)
    prepared = []
    for pieces in pack(manifests, config.window.tokens_per_micro_batch):
        lengths: list[int] = []
        positions, ids, labels = [], [], []
        before = 0
        for piece in pieces:
            batch = batches[piece.client]
            bounds = [0, *torch.tensor(batch.lengths).cumsum(0).tolist()]
            last = piece.first_sequence + piece.num_sequences
            begin, end = bounds[piece.first_sequence], bounds[last]
            inside = (batch.masked_positions >= begin) & (batch.masked_positions < end)
            chosen = batch.masked_positions[inside]
            labels.append(batch.labels[inside])
            lengths += batch.lengths[piece.first_sequence : last]
            positions.append(chosen - begin + before)
            ids.append(batch.input_ids[begin:end])
            before += end - begin
        with torch.no_grad():
            activations = half.embed(torch.cat(ids), lengths)
        masked_positions = torch.cat(positions)
        body_input = BodyInput(
            activations=activations.values.detach(),
            masked_positions=masked_positions,
            cu_seqlens=torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),
            row_index=activations.row_index,
            seed=1,
        )
        gradient = 1e-4 * torch.randn(len(masked_positions), half.widths.hidden, generator=random)
        prepared.append(_MicroBatch(torch.cat(ids), lengths, torch.cat(labels), body_input, gradient))
    return prepared


if __name__ == "__main__":
    main()
