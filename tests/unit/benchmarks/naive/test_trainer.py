"""The baseline trains what it says: over its HTTP and pickle it equals the same model trained in
one piece."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from benchmarks.naive import trainer
from fedbert_ds.bench.network.link import DelayProxy
from fedbert_ds.config import ModelSection
from fedbert_ds.model.checkpoint import build_model

SEQUENCES = [torch.tensor([2, 5, 6, 7, 3]), torch.tensor([2, 8, 3])]
LABELS = torch.tensor([[-100, 9, -100, 4, -100], [-100, 11, -100, -100, -100]])
RATE = 0.01


@pytest.fixture
def address() -> Iterator[str]:
    """A naive server in a thread of this process."""
    server = trainer.start_server(trainer.PaddedBody(_model(), RATE), "127.0.0.1")
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def _model():
    section = ModelSection(
        num_hidden_layers=2, hidden_size=8, num_attention_heads=2, max_position_embeddings=8, dropout=0.0
    )
    return build_model(section, 12, 0, seed=3)


@pytest.mark.parametrize("keep_connection", [False, True])
def test_training_over_http_is_training(address: str, keep_connection: bool) -> None:
    whole = copy.deepcopy(_model()).train()
    optimizer = torch.optim.AdamW(whole.parameters(), lr=RATE)
    client = trainer.Client(_model(), address, RATE, keep_connection)
    ids = pad_sequence(SEQUENCES, batch_first=True)
    mask = pad_sequence([torch.ones(len(s), dtype=torch.int64) for s in SEQUENCES], batch_first=True)
    for _ in range(3):
        logits = whole(input_ids=ids, attention_mask=mask).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), LABELS.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert client.train(SEQUENCES, LABELS) == pytest.approx(loss.item(), abs=1e-5)
    # Two requests of [2, 5, 8] fp32 a batch, and the mask.
    assert client.bytes_up >= 3 * 2 * 2 * 5 * 8 * 4 + 3 * 2 * 5 * 4
    assert client.bytes_down >= 3 * 2 * 2 * 5 * 8 * 4
    assert client.server_busy_seconds() > 0


@pytest.mark.parametrize(("keep_connection", "connections"), [(False, 5), (True, 1)])
def test_a_request_opens_a_connection_unless_it_is_kept(address: str, keep_connection: bool, connections: int) -> None:
    """Two requests a batch, and one that asks how long the body was busy; counted on a link."""
    link = DelayProxy(address)
    with link as through_link:
        client = trainer.Client(_model(), through_link, RATE, keep_connection)
        for _ in range(2):
            client.train(SEQUENCES, LABELS)
        client.server_busy_seconds()
        assert link.counts()["connections"] == connections
