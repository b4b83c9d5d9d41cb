"""The ceiling of `bench pipeline`: the same body under the same DeepSpeed engine, with nothing to wait for.

    python -m fedbert_ds.bench.body_alone --config FILE --shards FOLDER --tokenizer FOLDER [section.key=value ...]

Trains centrally on the windows that clients with these shards would bring: their sequence lengths and masked positions,
with activations and gradients made up beforehand. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fedbert_ds.config import RunConfig
    from fedbert_ds.data.masking import Batch
    from fedbert_ds.model.client_half import ClientHalf
    from fedbert_ds.server.engine import BodyInput


def main() -> None:
    """Warm up, then time the windows of the run file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    from fedbert_ds.config import load_config
    from fedbert_ds.server.distributed import initialize, shut_down

    config = load_config(options.config, options.overrides)
    initialize()
    from fedbert_ds.bench.text import first_batches
    from fedbert_ds.data.tokenizer import load_tokenizer
    from fedbert_ds.model.checkpoint import build_model
    from fedbert_ds.model.cut import split
    from fedbert_ds.server.engine import BodyEngine

    tokenizer = load_tokenizer(options.tokenizer)
    model = build_model(config.model, len(tokenizer), tokenizer.pad_token_id, config.run.seed)
    half, body = split(model, config.cut)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    engine = BodyEngine.build(body.to(device), config, device)
    windows = [_window(config, half, batches) for batches in first_batches(config, options.shards, tokenizer, 3)]
    tokens, started = 0, 0.0
    for number in range(config.run.windows):
        # The first window pays for what happens once.
        if number == 1:
            tokens, started = 0, time.monotonic()
        window = windows[number % len(windows)]
        for index, (body_input, gradient) in enumerate(window):
            engine.forward(index, body_input)
            engine.backward(index, gradient, is_last=index + 1 == len(window)).result()
            tokens += int(body_input.cu_seqlens[-1])
        engine.step(config.optimizer.lr * 1e-3)
    seconds = time.monotonic() - started
    print(json.dumps({"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}))
    shut_down()


def _window(config: RunConfig, half: ClientHalf, batches: Mapping[str, Batch]) -> list[tuple[BodyInput, Tensor]]:
    """[(input, gradient of the hidden states)] of one window, packed as the server packs it."""
    from fedbert_ds.server.engine import BodyInput
    from fedbert_ds.server.window import pack
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
        positions, ids = [], []
        before = 0
        for piece in pieces:
            batch = batches[piece.client]
            bounds = [0, *torch.tensor(batch.lengths).cumsum(0).tolist()]
            last = piece.first_sequence + piece.num_sequences
            begin, end = bounds[piece.first_sequence], bounds[last]
            chosen = batch.masked_positions[(batch.masked_positions >= begin) & (batch.masked_positions < end)]
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
        prepared.append((body_input, gradient))
    return prepared


if __name__ == "__main__":
    main()
