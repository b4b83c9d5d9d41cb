"""Halves with frames between them: centralized training in fp32, deterministic in every codec,
bytes as counted."""

import copy
from typing import get_args

import pytest
import torch
from torch.nn import functional

from benchmarks.codecs.counted import crossing, message_bytes
from benchmarks.codecs.split_training import RowFeedback, SplitTrainer
from fedbert_ds.config import Codec, ModelSection, OptimizerSection, WireSection
from fedbert_ds.data.masking import Batch
from fedbert_ds.model.checkpoint import build_model
from fedbert_ds.model.cut import split
from fedbert_ds.model.optimizer import build_optimizer
from fedbert_ds.wire.codecs import decode, encode

VOCABULARY, WIDTH, LENGTHS = 61, 16, [9, 9, 9]
OPTIMIZER = OptimizerSection(lr=1e-2, gradient_clipping=0.0)


def model_of(**changes):
    section = ModelSection(hidden_size=WIDTH, num_hidden_layers=2, dropout=0.0, max_position_embeddings=16, **changes)
    return build_model(section, VOCABULARY, 0, seed=3)


def batch_of(window):
    random = torch.Generator().manual_seed(window)
    ids = torch.randint(5, 20, (sum(LENGTHS),), generator=random)
    positions = (torch.rand(len(ids), generator=random) < 0.4).nonzero().flatten()
    return Batch(ids, LENGTHS, positions, torch.randint(5, VOCABULARY, (len(positions),), generator=random))


def trainer_of(cut="rows", codec="fp32", seed=1, model=None, compression="none", **options):
    wire = WireSection(activations=codec, gradients=codec, compression=compression)
    return SplitTrainer(*split(model or model_of(), cut), wire, OPTIMIZER, windows=4, seed=seed, **options)


def losses(trainer):
    return [trainer.train_window(window, batch_of(window)).loss_sum for window in range(4)]


@pytest.mark.parametrize("cut", ["rows", "embeddings"])
def test_with_fp32_it_is_centralized_training(cut):
    model = model_of().train()
    optimizer = build_optimizer(list(model.named_parameters()), OPTIMIZER)
    expected = []
    for window in range(4):
        batch = batch_of(window)
        logits = model(batch.input_ids.view(len(LENGTHS), -1)).logits.flatten(0, 1)[batch.masked_positions]
        loss = functional.cross_entropy(logits, batch.labels)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = OPTIMIZER.learning_rate(window, 4)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item() * len(batch.labels))
    assert losses(trainer_of(cut)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"stochastic": True}, {"centred": True}], ids=str)
def test_the_same_seed_gives_the_same_bits(options):
    first = losses(trainer_of(codec="int4_hadamard", **options))
    assert first == losses(trainer_of(codec="int4_hadamard", **options))
    other = losses(trainer_of(codec="int4_hadamard", seed=2, **options))
    assert (first != other) == ("stochastic" in options)


def test_the_loss_is_of_the_model_without_codecs():
    coarse, exact = trainer_of(codec="int4_hadamard"), trainer_of()
    batches = [batch_of(7), batch_of(8)]
    assert coarse.loss(batches) == exact.loss(batches)


def test_what_is_owed_to_a_row_is_sent_later():
    rows, ids = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)), torch.tensor([4, 0, 9])
    feedback, total = RowFeedback(10, 64), torch.zeros(3, 64)
    for _ in range(50):
        wanted = feedback.before(rows, ids)
        sent = decode(encode(wanted, "int4_hadamard"), rows.shape, "int4_hadamard", "it")
        feedback.after(wanted, sent, ids)
        total += sent
    assert (total / 50 - rows).abs().max() < 0.02 < (sent - rows).abs().max()


@pytest.mark.parametrize("codec", get_args(Codec))
@pytest.mark.parametrize("cut", ["rows", "embeddings"])
def test_bytes_are_counted_from_the_messages_a_window_takes(codec, cut):
    batch = batch_of(0)
    trainer = trainer_of(cut, codec)
    wire = WireSection(activations=codec, gradients=codec, compression="none")
    sizes = message_bytes(batch, crossing(trainer.half, trainer.body, batch), wire)
    trainer.half.zero_grad(), trainer.body.zero_grad()
    crossed = trainer.train_window(1000, batch)
    assert (crossed.bytes_up, crossed.bytes_down) == sizes


def test_compressed_bytes_are_counted_of_what_a_window_really_sends():
    batch, trainer = batch_of(0), trainer_of("rows", "fp32", compression="zstd")
    sizes = message_bytes(batch, crossing(trainer.half, trainer.body, batch), WireSection())
    trainer.half.zero_grad(), trainer.body.zero_grad()
    crossed = trainer.train_window(1000, batch)
    assert (crossed.bytes_up, crossed.bytes_down) == sizes


def test_a_trained_model_is_not_changed_by_asking_for_its_loss():
    trainer = trainer_of()
    before = copy.deepcopy(trainer.half.state_dict())
    trainer.loss([batch_of(1)])
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.half.state_dict().items())
    assert trainer.half.training and trainer.body.training
