"""`fedbert-ds bench memory`: what a micro-batch in flight keeps between forward and backward.

Counted on the meta device, so that it needs neither a GPU nor the models' memory: the storages that
autograd keeps in one forward of the body. Parameters do not count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from fedbert_ds.bench.body.benchmark import BASE, LARGE, TINY
from fedbert_ds.bench.body.encoders import MASK_SHARE, Shape
from fedbert_ds.config import Kernels, ModelSection
from fedbert_ds.model.body import Recomputed
from fedbert_ds.model.checkpoint import config_of
from fedbert_ds.server.body.footprint import SHARE, bytes_kept
from fedbert_ds.telemetry.record import source_commit, write_record
from fedbert_ds.telemetry.tables import markdown

LENGTH, SEQUENCES = 512, 16
DROPOUT = 0.1
CARD = 80e9
"""Bytes of a card, of which `SHARE` is for micro-batches in flight."""
KERNELS: tuple[Kernels, ...] = ("torch", "triton")
MODERN = Shape("ModernBERT-base", layers=22, hidden_size=768, heads=12)
"""It trains without dropout."""


@dataclass(frozen=True)
class MemoryOptions:
    """What a user gives the benchmark."""

    out: Path
    """The record."""
    command: str
    """What the user typed, for the record."""
    quick: bool = False


def bench_memory(options: MemoryOptions) -> None:
    """Count for all models, kernel sets and choices, write the record, print the table."""
    commit = source_commit()
    shapes = (TINY,) if options.quick else (BASE, LARGE, MODERN)
    rows = [row for shape in shapes for kernels in KERNELS for row in count(shape, kernels)]
    settings = {"length": LENGTH, "sequences": SEQUENCES, "mask_share": MASK_SHARE, "dropout": DROPOUT, "card": CARD}
    write_record(
        options.out, command=options.command, commit=commit, rows=rows, settings=settings | {"precision": "bf16"}
    )
    print(f"{table(rows)}\n\nrecord  {options.out}", flush=True)


def count(shape: Shape, kernels: Kernels) -> list[dict[str, Any]]:
    """A row for each choice of checkpointing."""
    is_modern = shape.name.startswith("Modern")
    section = ModelSection(
        architecture="modernbert" if is_modern else "bert",
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.heads,
        max_position_embeddings=shape.longest,
        dropout=0.0 if is_modern else DROPOUT,
    )
    hf_config, lengths = config_of(section, 100, 0), [LENGTH] * SEQUENCES
    tokens = sum(lengths)
    rows: list[dict[str, Any]] = []
    for what in get_args(Recomputed):
        kept = bytes_kept(
            hf_config, "embeddings", kernels, what, torch.bfloat16, lengths, masked=round(MASK_SHARE * tokens)
        )
        rows.append(
            {
                "model": shape.name,
                "kernels": kernels,
                "checkpointing": what,
                "bytes_per_token": kept / tokens,
                "beside_none": kept / (rows[0]["bytes_per_token"] * tokens if rows else kept),
                "micro_batches": int(SHARE * CARD / kept),
            }
        )
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table."""
    heads = ["model", "`kernels`", "`activation_checkpointing`", "kB a token", "beside `none`", "micro-batches"]
    cells = [
        [
            row["model"],
            f"`{row['kernels']}`",
            f"`{row['checkpointing']}`",
            f"{row['bytes_per_token'] / 1e3:,.1f}",
            f"{100 * row['beside_none']:.1f} %",
            f"{row['micro_batches']:,}",
        ]
        for row in rows
    ]
    return markdown(heads, cells, words=3)
