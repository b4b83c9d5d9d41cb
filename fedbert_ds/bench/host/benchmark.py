"""`fedbert-ds bench host`: the host's time for a micro-batch, where arithmetic is next to nothing.

A GPU waits for the host that launches its work. Forward and backward of the body through the engine
take turns with the same transformers layers called plainly, on the CPU, at a toy width. The engine
also decodes what came from clients, and encodes what goes back.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from fedbert_ds.bench.device import time_side_by_side
from fedbert_ds.config import ModelSection, RunConfig
from fedbert_ds.model.checkpoint import build_model
from fedbert_ds.model.cut import split
from fedbert_ds.run_file import parse_config
from fedbert_ds.server.body.distributed import initialize, shut_down
from fedbert_ds.server.body.engine import BodyEngine
from fedbert_ds.server.body.packed_input import BodyInput
from fedbert_ds.telemetry.record import source_commit, write_record
from fedbert_ds.telemetry.tables import markdown
from fedbert_kernels.encoded import Encoded

WIDTH, SEQUENCES, LENGTH, MASKED_EVERY = 16, 4, 16, 7
CODEC = "int8"
PLAIN = "transformers' layers, plainly"
SELECTIVE = "the same under torch's selective checkpointing"
RECOMPUTED = "engine, ZeRO 1, `activation_checkpointing: elementwise`"
APART = "engine, ZeRO 3, each layer gathered by itself"
GATHERED = 7
"""Layers that ZeRO stage 3 gathers together: as many as of BERT-base, by DeepSpeed's default of 50M
parameters."""
CPU = torch.device("cpu")


@dataclass(frozen=True)
class HostOptions:
    """What a user gives the benchmark."""

    out: Path
    """The record."""
    command: str
    """What the user typed, for the record."""
    rounds: int = 15
    """Measurements of each; medians count."""
    quick: bool = False


def bench_host(options: HostOptions) -> None:
    """Measure every ZeRO stage beside plain layers, write the record, print the table."""
    commit = source_commit()
    layers, rounds, seconds = (2, 2, 0.01) if options.quick else (12, options.rounds, 0.5)
    torch.set_num_threads(1)
    initialize()
    ways = {PLAIN: plain(layers), SELECTIVE: plain(layers, is_selective=True)}
    for stage in range(4):
        ways[f"engine, ZeRO {stage}"] = engine(layers, stage)
        if stage == 1:
            ways[RECOMPUTED] = engine(layers, stage, "elementwise")
    ways[APART] = engine(layers, 3, gathered=1)
    # One thread does all of it; what else the machine does would count as the host's.
    timings = time_side_by_side(ways, CPU, rounds, seconds, clock=time.process_time)
    rows = [
        {
            "way": name,
            "seconds": timing.median,
            "fastest": timing.fastest,
            "slowest": timing.slowest,
            "beside_plain": timing.median / timings[PLAIN].median,
        }
        for name, timing in timings.items()
    ]
    shut_down()
    settings = {"layers": layers, "width": WIDTH, "sequences": SEQUENCES, "length": LENGTH, "rounds": rounds}
    write_record(
        options.out,
        command=options.command,
        commit=commit,
        rows=rows,
        settings=settings | {"precision": "fp32", "codec": CODEC, "threads": torch.get_num_threads()},
    )
    print(f"{table(rows)}\n\nrecord  {options.out}", flush=True)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table."""
    cells = [[row["way"], f"{1e3 * row['seconds']:.1f}", f"{row['beside_plain']:.2f}x"] for row in rows]
    return markdown(["way", "ms a micro-batch", "beside plain layers"], cells)


def plain(layers: int, is_selective: bool = False) -> Callable[[], None]:
    """Forward and backward of a model's layers, on sequences of one length.

    Selective checkpointing keeps matrix products and attention and computes the rest again.
    """
    with tempfile.TemporaryDirectory() as folder:
        model: Any = build_model(_config(layers, 0, Path(folder)).model, 100, 0, 1)
    model.train()
    if is_selective:
        aten = torch.ops.aten
        kept = [aten.mm.default, aten.addmm.default, aten.bmm.default]
        kept.append(aten._scaled_dot_product_flash_attention_for_cpu.default)
        contexts = partial(create_selective_checkpoint_contexts, kept)
        for layer in model.bert.encoder.layer:
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, context_fn=contexts)
    hidden, gradient = (torch.randn(SEQUENCES, LENGTH, WIDTH) for _ in range(2))

    def run() -> None:
        inputs = hidden.clone().requires_grad_(True)
        model.bert.encoder(inputs).last_hidden_state.backward(gradient)

    return run


def engine(layers: int, stage: int, checkpointing: str = "none", gathered: int = GATHERED) -> Callable[[], None]:
    """The same, packed, through the engine under DeepSpeed: results are on the CPU afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        config = _config(layers, stage, Path(folder), checkpointing, gathered)
        _, body = split(build_model(config.model, 100, 0, 1), "embeddings")
        built = BodyEngine.build(body, config.body, config.optimizer, "torch", CPU)
    tokens = SEQUENCES * LENGTH
    activations, masked = Encoded.of(torch.randn(tokens, WIDTH), CODEC), torch.arange(0, tokens, MASKED_EVERY)
    bounds = torch.arange(0, tokens + 1, LENGTH, dtype=torch.int32)
    gradient = Encoded.of(torch.randn(len(masked), WIDTH), CODEC)

    def run() -> None:
        built.forward(0, BodyInput([activations], masked, bounds, None, 7), CODEC).result()
        built.backward(0, [gradient], CODEC).result()

    return run


def _config(layers: int, stage: int, folder: Path, checkpointing: str = "none", gathered: int = GATHERED) -> RunConfig:
    file = folder / "zero.json"
    bucket = {"stage3_prefetch_bucket_size": gathered * 12 * WIDTH**2} if stage == 3 else {}
    file.write_text(json.dumps({"zero_optimization": {"stage": stage, **bucket}}))
    model = ModelSection(hidden_size=WIDTH, num_attention_heads=2, num_hidden_layers=layers)
    body = {"deepspeed": str(file), "activation_checkpointing": checkpointing}
    return parse_config({"model": model.model_dump(), "body": body}, "bench host")
