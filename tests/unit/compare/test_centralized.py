"""Centralized training learns, repeats itself bit for bit, leaves a run folder, and clips the
whole gradient by one norm."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import backend_registration
from unit.compare.small import prepared, run_file

from fedbert_ds.compare.centralized import Centralized, shards_of, train_centralized
from fedbert_ds.data.corpus import Article
from fedbert_ds.data.tokenizer import load_tokenizer, train_wordpiece
from fedbert_ds.errors import RunError
from fedbert_ds.run_file import parse_config

ARTICLES = {
    "ada": [
        Article(str(n), "the federated model learns from text that never leaves the clinic " * 6) for n in range(4)
    ],
    "bo": [Article(str(n), "a lobster lives on the sea floor and moults several times a year " * 4) for n in range(2)],
}


def config(folder="unused", **sections):
    tree = {
        "run": {"directory": str(folder), "windows": 6, "seed": 3},
        "model": {"hidden_size": 16, "num_hidden_layers": 2, "dropout": 0.0, "max_position_embeddings": 32},
        "tokenizer": {"vocab_size": 100},
        "data": {"sequence_length": 24},
        "window": {"tokens": 200, "tokens_per_micro_batch": 96},
        "optimizer": {"lr": 0.01, "gradient_clipping": 0.0},
        "clients": {"expected": 2, "local": 2},
    }
    for section, values in sections.items():
        tree[section] = tree.get(section, {}) | values
    return parse_config(tree, "test")


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece([article for shard in ARTICLES.values() for article in shard], 100)


def test_the_loss_falls_and_the_same_seed_gives_the_same_bits(tokenizer):
    def train():
        trainer = Centralized(config(), tokenizer, ARTICLES)
        return [trainer.train_window(window) for window in range(6)], trainer.model.state_dict()

    (windows, weights), (again, weights_again) = train(), train()
    assert windows == again
    assert all(torch.equal(weights[name], weights_again[name]) for name in weights)
    assert windows[-1].loss < windows[0].loss
    assert all(window.tokens <= 200 and 0 < window.masked_tokens < window.tokens for window in windows)


def test_a_window_is_the_mean_over_all_clients_masked_tokens(tokenizer):
    trainer = Centralized(config(), tokenizer, ARTICLES)
    twin = Centralized(config(), tokenizer, ARTICLES)
    batches = {client: stream.next_batch(0, twin.shares[client]) for client, stream in twin.streams.items()}
    total = 0.0
    for batch in batches.values():
        for ids, labels in zip(batch.input_ids.split(batch.lengths), _targets(batch).split(batch.lengths), strict=True):
            logits = twin.model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None]).logits[0]
            total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
    masked = sum(len(batch.labels) for batch in batches.values())
    trained = trainer.train_window(0)
    assert trained.masked_tokens == masked
    assert trained.loss == pytest.approx(total / masked, rel=1e-5)


def test_clipping_is_by_one_norm(tokenizer):
    trainer = Centralized(config(optimizer={"gradient_clipping": 1e-3}), tokenizer, ARTICLES)
    norms = []
    step = trainer.optimizer.step

    def watched():
        norms.append(torch.stack([parameter.grad.norm() for parameter in trainer.model.parameters()]).norm().item())
        step()

    trainer.optimizer.step = watched
    trainer.train_window(0)
    assert norms == pytest.approx([1e-3], rel=1e-2)


def test_a_run_folder_as_a_federation_leaves_it(tmp_path):
    source = tmp_path / "text.jsonl"
    articles = [article for shard in ARTICLES.values() for article in shard]
    source.write_text("".join(json.dumps({"title": a.title, "text": a.text}) + "\n" for a in articles))
    folder = tmp_path / "run"
    settings = config(folder, data={"source": [str(source)]})
    train_centralized(settings)
    left = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "loss.png", "hf", "held_out.jsonl", "clients", "tokenizer"} <= left
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["window"] for line in lines] == list(range(6))
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    model = AutoModelForMaskedLM.from_pretrained(folder / "hf")
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(folder / "hf"))
    with pytest.raises(RunError, match="holds a run already"):
        train_centralized(settings)


def _targets(batch):
    labels = torch.full_like(batch.input_ids, -100)
    labels[batch.masked_positions] = batch.labels
    return labels


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="torch before 2.10 makes no device of Python",
)
def test_on_another_device_it_computes_the_same(tmp_path):
    settings, text = prepared(tmp_path)
    worker = Path(__file__).with_name("device_worker.py")
    command = [sys.executable, str(worker), str(run_file(tmp_path)), str(text.path)]
    paths = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
    there = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths})
    assert there.returncode == 0, there.stderr
    trainer = Centralized(settings, load_tokenizer(str(text.tokenizer)), shards_of(text))
    here = [trainer.train_window(window).loss for window in range(3)]
    assert json.loads(there.stdout.splitlines()[-1]) == pytest.approx(here, rel=1e-5)
