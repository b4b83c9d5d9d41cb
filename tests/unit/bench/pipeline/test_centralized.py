"""The micro-batches that centralized training takes hold what the clients' batches hold."""

from __future__ import annotations

import torch

from fedbert_ds.bench.pipeline.centralized import micro_batches_of
from fedbert_ds.bench.pipeline.settings import RUN_FILE
from fedbert_ds.config import ModelSection
from fedbert_ds.data.masking import Batch
from fedbert_ds.model.checkpoint import build_model
from fedbert_ds.model.cut import split
from fedbert_ds.run_file import load_config

BATCHES = {
    "ada": Batch(torch.arange(10, 22), [4, 5, 3], torch.tensor([1, 4, 10]), torch.tensor([51, 52, 53])),
    "bo": Batch(torch.arange(30, 37), [7], torch.tensor([0, 6]), torch.tensor([54, 55])),
}


def test_every_token_and_label_is_in_one_micro_batch() -> None:
    config = load_config(RUN_FILE, ["window.tokens_per_micro_batch=9", "data.sequence_length=9", "cut=embeddings"])
    section = ModelSection(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, max_position_embeddings=8)
    half, _ = split(build_model(section, 60, 0, seed=1), "embeddings")
    window = micro_batches_of(config, half, BATCHES)
    assert [micro_batch.lengths for micro_batch in window] == [[4, 5], [3], [7]]
    assert torch.cat([m.input_ids for m in window]).tolist() == [*range(10, 22), *range(30, 37)]
    assert [m.labels.tolist() for m in window] == [[51, 52], [53], [54, 55]]
    assert [m.body_input.masked_positions.tolist() for m in window] == [[1, 4], [1], [0, 6]]
    assert [m.body_input.cu_seqlens.tolist() for m in window] == [[0, 4, 9], [0, 3], [0, 7]]
    for micro_batch in window:
        (activations,) = micro_batch.body_input.activations
        assert (len(activations), activations.width) == (len(micro_batch.input_ids), 16)
        assert (len(micro_batch.gradient), micro_batch.gradient.width) == (len(micro_batch.labels), 16)
