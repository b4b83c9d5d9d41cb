"""Counted memory in flight: by hand, as a real forward keeps it, and in a record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedbert_ds.bench.body.encoders import Shape
from fedbert_ds.bench.memory.benchmark import LENGTH, SEQUENCES, MemoryOptions, bench_memory, count, table
from fedbert_ds.model.body import CODES
from fedbert_kernels.encoded import form

TOKENS = LENGTH * SEQUENCES
WIDTH, HEADS = 128, 2


VALUES, SEED = 2 * WIDTH * TOKENS, 2 * 8
"""Bytes of a row of bf16 values for each token, and of a dropout's seed."""
NORMS = 4 * TOKENS * 2 * 2
"""Means and deviations of two LayerNorms."""
IN_FP32 = 4 * TOKENS * HEADS + NORMS
"""These and attention's logarithms of sums."""


def in_codes(columns: int) -> int:
    """Bytes of so many columns for each token, with their scales."""
    return TOKENS * sum(number * dtype.itemsize for number, dtype in filter(None, form(columns, CODES)))


def of_a_layer(kernels: Any, name: str = "") -> dict[str, float]:
    """Bytes of one layer between others, for all tokens, by choice of checkpointing."""
    many, few = (count(Shape(name, layers, WIDTH, HEADS), kernels) for layers in (4, 3))
    return {
        a["checkpointing"]: round(TOKENS * (a["bytes_per_token"] - b["bytes_per_token"]))
        for a, b in zip(many, few, strict=True)
    }


def test_a_layer_of_fused_kernels_by_hand() -> None:
    """Input, q, k, v, attention's result, the product after it, the normalized sum, four times the
    width before GELU and after it, the last product."""
    joined = 2 * 3 * WIDTH * WIDTH  # the weights of q, k and v, copied into one
    assert of_a_layer("triton") == {
        "none": 16 * VALUES + IN_FP32 + 3 * SEED + joined,
        # The products' results alone.
        "elementwise": 10 * VALUES + IN_FP32 + 3 * SEED,
        # Of attention, query, key and value alone.
        "attention": 9 * VALUES + NORMS + 2 * SEED,
        # Before GELU codes.
        "int8": 6 * VALUES + in_codes(4 * WIDTH) + IN_FP32 + 3 * SEED,
        "layers": VALUES,
    }


def test_a_layer_in_torch_by_hand() -> None:
    """The sums before LayerNorm in place of products, and two dropouts' masks, here in bf16."""
    assert of_a_layer("torch") == {
        "none": 18 * VALUES + IN_FP32 + SEED,
        "elementwise": 12 * VALUES + IN_FP32 + SEED,
        "attention": 11 * VALUES + NORMS,
        "int8": 8 * VALUES + in_codes(4 * WIDTH) + IN_FP32 + SEED,
        "layers": VALUES,
    }


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_a_layer_of_modernbert_by_hand(kernels: Any) -> None:
    """Input, rotated q and k and v alone, attention's result, the sum after it, gate and what it
    lets through, each 1.5 times as wide; what goes are both LayerNorms' results, GELU's and the
    gate's.
    """
    assert of_a_layer(kernels, "ModernBERT") == {
        "none": (9 + 2 + 3) * VALUES + IN_FP32,
        "elementwise": 9 * VALUES + IN_FP32,
        "attention": 8 * VALUES + NORMS,
        "int8": 6 * VALUES + in_codes(3 * WIDTH) + IN_FP32,
        "layers": VALUES,
    }


def test_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench_memory(MemoryOptions(tmp_path / "memory.json", "bench memory", quick=True))
    rows = json.loads((tmp_path / "memory.json").read_text())["rows"]
    assert [(row["kernels"], row["checkpointing"]) for row in rows] == [
        (kernels, what)
        for kernels in ("torch", "triton")
        for what in ("none", "elementwise", "attention", "int8", "layers")
    ]
    assert all(row["beside_none"] == 1.0 for row in rows if row["checkpointing"] == "none")
    assert table(rows) in capsys.readouterr().out
