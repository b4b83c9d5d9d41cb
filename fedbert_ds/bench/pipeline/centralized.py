"""Centralized training for `bench pipeline`: the same body under DeepSpeed, waiting for nothing.

    python -m fedbert_ds.bench.pipeline.centralized --config FILE --shards FOLDER --tokenizer FOLDER
        [--whole] [section.key=value ...]

Trains on the windows that clients with these shards would bring, packed as the server packs them.
With --whole the embeddings and the head are trained too, in this process: what DeepSpeed alone
would do with the pooled text. Without it activations and gradients are made up beforehand: a
ceiling. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedbert_ds.user_path import user_path
from fedbert_kernels.encoded import Encoded

if TYPE_CHECKING:
    from fedbert_ds.config import RunConfig
    from fedbert_ds.data.masking import Batch
    from fedbert_ds.model.client_half import ClientHalf
    from fedbert_ds.server.body.engine import BodyEngine
    from fedbert_ds.server.body.packed_input import BodyInput

DIFFERENT_WINDOWS = 3
"""Made beforehand, and trained on in turn."""


def main() -> None:
    """Warm up, then time the windows of the run file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=user_path, required=True)
    parser.add_argument("--shards", type=user_path, required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args()
    from fedbert_ds.run_file import load_config
    from fedbert_ds.server.body.distributed import initialize, shut_down

    config = load_config(options.config, options.overrides)
    initialize()
    from fedbert_ds.bench.text import first_batches
    from fedbert_ds.data.tokenizer import load_tokenizer, num_rows
    from fedbert_ds.model.checkpoint import build_model
    from fedbert_ds.model.cut import split
    from fedbert_ds.model.optimizer import build_optimizer
    from fedbert_ds.server.body.engine import BodyEngine

    tokenizer = load_tokenizer(options.tokenizer)
    model = build_model(config.model, num_rows(tokenizer), tokenizer.pad_token_id, config.run.seed)
    half, body = split(model, config.cut)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    engine = BodyEngine.build(body.to(device), config.body, config.optimizer, config.kernels, device)
    optimizer = build_optimizer(list(half.named_parameters()), config.optimizer)
    batches = first_batches(config, options.shards, tokenizer, DIFFERENT_WINDOWS)
    windows = [micro_batches_of(config, half, window) for window in batches]
    tokens, started = 0, 0.0
    for number in range(config.run.windows):
        # The first window pays for what happens once.
        if number == 1:
            tokens, started = 0, time.monotonic()
        window = windows[number % len(windows)]
        train_body(engine, half if options.whole else None, window)
        engine.step(config.optimizer.lr * 1e-3)
        if options.whole:
            optimizer.step()
            optimizer.zero_grad()
        tokens += sum(sum(micro_batch.lengths) for micro_batch in window)
    seconds = time.monotonic() - started
    print(json.dumps({"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}))
    shut_down()


@dataclass(frozen=True)
class MicroBatch:
    """What one micro-batch takes: of the whole model, and of the body alone."""

    input_ids: Tensor
    """[tokens] int64."""
    lengths: list[int]
    labels: Tensor
    """[masked] int64."""
    body_input: BodyInput
    gradient: Encoded
    """[masked, H] of the hidden states, made up."""


def train_body(engine: BodyEngine, half: ClientHalf | None, window: list[MicroBatch]) -> None:
    """Forward and backward of a window, through embeddings and head too if `half` is given."""
    num_masked = sum(len(micro_batch.labels) for micro_batch in window)
    under_way = []
    for index, micro_batch in enumerate(window):
        if half is None:
            engine.forward(index, micro_batch.body_input)
            # Nothing depends on it, so a GPU has the next one before it is done.
            under_way.append(engine.backward(index, [micro_batch.gradient]))
            continue
        activations = half.embed(micro_batch.input_ids, micro_batch.lengths)
        values = Encoded.of(activations.values.detach(), "fp32")
        hidden, _ = engine.forward(index, replace(micro_batch.body_input, activations=[values])).result()
        _, gradient = half.head_backward(hidden.decode(), micro_batch.labels, 1.0 / num_masked)
        input_gradient, _ = engine.backward(index, [Encoded.of(gradient, "fp32")]).result()
        activations.values.backward(input_gradient.decode())
    for work in under_way:
        work.result()


def micro_batches_of(config: RunConfig, half: ClientHalf, batches: Mapping[str, Batch]) -> list[MicroBatch]:
    """One window of these clients' batches, packed as the server packs it."""
    from fedbert_ds.server.queue.packing import pack
    from fedbert_ds.wire.messages import Manifest

    manifests = []
    for name, batch in batches.items():
        masked = torch.searchsorted(batch.masked_positions, _bounds(batch.lengths)).diff().tolist()
        manifests.append(Manifest(name, 0, tuple(batch.lengths), tuple(masked)))
    random = torch.Generator().manual_seed(1)
    window = []
    for pieces in pack(manifests, config.window.tokens_per_micro_batch):
        parts = [_part(batches[piece.client], piece.first_sequence, piece.num_sequences) for piece in pieces]
        window.append(_micro_batch(half, parts, random))
    return window


def _part(batch: Batch, first: int, count: int) -> Batch:
    """Sequences of a batch, as a batch of their own."""
    bounds = _bounds(batch.lengths)
    begin, end = bounds[first], bounds[first + count]
    inside = (batch.masked_positions >= begin) & (batch.masked_positions < end)
    lengths = batch.lengths[first : first + count]
    return replace(
        batch,
        input_ids=batch.input_ids[begin:end],
        lengths=lengths,
        masked_positions=batch.masked_positions[inside] - begin,
        labels=batch.labels[inside],
    )


def _micro_batch(half: ClientHalf, parts: list[Batch], random: torch.Generator) -> MicroBatch:
    from fedbert_ds.server.body.packed_input import BodyInput

    input_ids, labels = (torch.cat([getattr(part, name) for part in parts]) for name in ("input_ids", "labels"))
    lengths = [length for part in parts for length in part.lengths]
    starts = _bounds([len(part.input_ids) for part in parts])
    positions = torch.cat([part.masked_positions + start for part, start in zip(parts, starts[:-1], strict=True)])
    with torch.no_grad():
        activations = half.embed(input_ids, lengths)
    body_input = BodyInput(
        activations=[Encoded.of(activations.values.detach(), "fp32")],
        masked_positions=positions,
        cu_seqlens=_bounds(lengths).to(torch.int32),
        row_index=activations.row_index,
        seed=1,
    )
    gradient = 1e-4 * torch.randn(len(positions), half.widths.hidden, generator=random)
    return MicroBatch(input_ids, lengths, labels, body_input, Encoded.of(gradient, "fp32"))


def _bounds(lengths: list[int]) -> Tensor:
    """[n + 1] int64: where each of these lengths begins, and the end of the last."""
    return torch.tensor([0, *lengths]).cumsum(0)


if __name__ == "__main__":
    main()
