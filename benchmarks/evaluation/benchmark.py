"""`python -m benchmarks.evaluation`: ways to batch held-out text, taking turns on one model.

- in order: a fixed number of sequences, as they come
- by count: a fixed number of sequences of like lengths, as `fedbert-ds eval` had it before
- by tokens: like lengths, a bounded number of padded tokens: what it does on a GPU and with
  architectures that our layers do not know
- packed: as many tokens without any padding, by our own layers: what it does else

All give the same loss to rounding, which is checked.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedbert_ds.config import ModelSection
from fedbert_ds.data.corpus import read_articles
from fedbert_ds.data.masking import EncodedText, Masker, encode
from fedbert_ds.data.tokenizer import train_wordpiece
from fedbert_ds.evaluation.batches import MaskedText, packed_batches, padded_batches
from fedbert_ds.evaluation.masked_lm import PackedSum, masked_lm_loss, scores_at
from fedbert_ds.model.checkpoint import build_model
from fedbert_ds.model.cut import undivided
from fedbert_ds.telemetry.record import source_commit, write_record
from fedbert_ds.telemetry.tables import markdown

SEED = 0
SHAPE = ModelSection(hidden_size=256, num_attention_heads=4, num_hidden_layers=4, max_position_embeddings=512)
QUICK = ModelSection(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, max_position_embeddings=512)
LENGTH = 512
TOLERANCE = 1e-4
"""Of a loss, nats: order and shape of products differ."""


@dataclass(frozen=True)
class EvaluationOptions:
    """What a user gives the benchmark."""

    out: Path
    """The record."""
    command: str
    """What the user typed, for the record."""
    data: str = "python-docs"
    """Source of the articles."""
    sequences: int = 384
    batch_size: int = 16
    rounds: int = 5
    quick: bool = False


def bench_evaluation(options: EvaluationOptions) -> None:
    """Measure every way in turns, print a table, write the record."""
    articles = list(read_articles([options.data], max_articles=20 if options.quick else 150))
    tokenizer = train_wordpiece(articles, 500 if options.quick else 4000)
    model = build_model(QUICK if options.quick else SHAPE, len(tokenizer), tokenizer.pad_token_id, SEED).eval()
    text = encode(articles, tokenizer, LENGTH)
    masked = MaskedText.of(text, Masker(tokenizer, mask_probability=0.15), SEED)
    sequences = masked.chosen(12 if options.quick else options.sequences)
    ways = ways_of(model, tokenizer.pad_token_id, text, masked, sequences, options.batch_size)
    losses = {name: evaluate() for name, (evaluate, _) in ways.items()}  # which warms up, too
    expected = masked_lm_loss(model, tokenizer, text, seed=SEED, max_sequences=len(sequences)).loss
    for name, loss in losses.items():
        assert abs(loss - expected) < TOLERANCE, f"{name}: {loss} instead of {expected}"
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(1 if options.quick else options.rounds):
        for name, (evaluate, _) in ways.items():
            begun = time.perf_counter()
            evaluate()
            seconds[name].append(time.perf_counter() - begun)
    rows = [
        {"way": name, "seconds": seconds[name], "median": statistics.median(seconds[name]), "padding": padding}
        for name, (_, padding) in ways.items()
    ]
    tokens = int(text.lengths[sequences].sum())
    write_record(options.out, command=options.command, commit=source_commit(), rows=rows, tokens=tokens)
    print(table(rows))


def ways_of(
    model: Any, padding: int, text: EncodedText, masked: MaskedText, sequences: torch.Tensor, batch_size: int
) -> dict[str, tuple[Callable[[], float], float]]:
    """By name: a function that evaluates, and the share of its tokens that are padding."""
    lengths = text.lengths
    half = undivided(copy.deepcopy(model)).eval()
    num_masked = len(masked.packed(sequences.tolist()).labels)

    def padded(batches: list[list[int]]) -> tuple[Callable[[], float], float]:
        places = sum(len(batch) * int(lengths[batch].max()) for batch in batches)

        def evaluate() -> float:
            return sum(_summed(model, *masked.padded(batch, padding)) for batch in batches) / num_masked

        return evaluate, 1 - int(lengths[sequences].sum()) / places

    def packed() -> float:
        sum_of = PackedSum(half, masked)
        return sum(map(sum_of, packed_batches(sequences, lengths, batch_size))) / num_masked

    counted = [batch.tolist() for batch in sequences.split(batch_size)]
    in_order = [batch.tolist() for batch in sequences.sort().values.split(batch_size)]
    return {
        "in order": padded(in_order),
        "by count": padded(counted),
        "by tokens": padded(padded_batches(sequences, lengths, batch_size)),
        "packed": (packed, 0.0),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Times as shares of what `by count` took."""
    before = next(row["median"] for row in rows if row["way"] == "by count")
    cells = [[row["way"], f"{100 * row['padding']:.1f} %", f"{row['median'] / before:.2f}"] for row in rows]
    return markdown(["batches", "padding", "time, of that by count"], cells)


@torch.inference_mode()
def _summed(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, targets: torch.Tensor) -> float:
    scores = scores_at(model, input_ids, attention_mask, targets >= 0)
    return float(torch.nn.functional.cross_entropy(scores, targets[targets >= 0], reduction="sum"))
